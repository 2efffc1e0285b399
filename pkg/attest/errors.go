package attest

import "errors"

var errNotImplemented = errors.New("attest: not implemented")

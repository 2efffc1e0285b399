// Package internal holds, until the code that imports them lands, the modules
// that are being adopted.
package internal

import (
	_ "github.com/transparency-dev/formats/log"
)

// Package forge makes evidence, good and bad, without a TPM: an in-memory maker
// of TPMs with a root and an intermediate, a software "TPM" with endorsement
// and attestation keys, an attestation CA, and SVIDs with evidence inside.
//
// It is for tests only. Each thing it makes can be bent in one place through a
// hook, so that a test shows one defect at a time.
package forge

// Package attest holds the evidence that a TPM commits to a key and a
// statement, its strict decoding, and its verification. The wire format is
// described byte for byte in docs/evidence.md.
//
// The package is pure: no clock, disk, network or environment. Parsing yields
// Evidence, which proves nothing; only Verify makes a *Verified.
package attest

// Package tlog verifies entries of a transparency log offline: a body in the
// Rekor v2 form, its place in a Merkle tree, the log's signature on that tree
// and the cosignatures of witnesses, which also say when they saw it.
//
// What an entry proves is that its log has shown it to everybody who looks: a
// key used in secret leaves either a public trace or a signature that does not
// verify. It does not prove that what was logged is true.
//
// The package does no I/O and reads no clock.
package tlog

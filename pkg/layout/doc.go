// Package layout judges a whole pipeline: in-toto layouts whose functionaries
// are SPIFFE identities with demands on their hardware, and the links of every
// step against them. Like all of pkg it is pure: files, the clock and whatever
// was seen before are arguments.
//
// Artifact rules are applied by in-toto-golang's own engine, so that they mean
// here what they mean elsewhere; what is common is accepted by a queue that a
// test holds against it. Of that module only UnpackRule, VerifyArtifacts,
// Set.Filter, the key loader and the metadata types are used: code without I/O. Signatures,
// time, thresholds and everything about machines are ours.
package layout

// Package link makes and verifies links: in-toto statements about one build
// step, signed with an SVID that carries hardware evidence, and the trust.json
// that says whom to believe.
//
// The flow cannot skip a stage: Statement —Prepare→ Prepared, whose Digest the
// TPM commits to; Prepared —Sign→ Bundle; Bundle —Verify→ Result. A Bundle that
// was parsed proves nothing: everything it hands out says Unverified.
//
// The package is pure: no clock, disk, network or environment.
package link

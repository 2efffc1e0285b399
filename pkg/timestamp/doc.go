// Package timestamp reads and judges RFC 3161 time-stamp tokens: a timestamp
// authority's word that a signature existed at a certain time.
//
// Parse takes the DER of a TimeStampResp, which is what Sigstore bundles hold
// and what an authority answers over HTTP, and is strict: one encoding, one
// signer, no unsigned attributes, hashes of SHA-256 or stronger. A Token that
// was parsed proves nothing. Verify holds it against the signature it is for
// and the authorities that the caller trusts.
//
// The package is pure: it opens nothing and asks no clock. A token is judged at
// its own time, which its authority vouches for, and inside the window in which
// the caller trusts that authority.
package timestamp

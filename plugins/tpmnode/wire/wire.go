// Package wire holds what both sides of the tpmnode plugin agree on: names,
// sizes, and the encoding of the messages in proto/rootlink/tpm/v1 with a bound
// on each, checked before anything is decoded.
package wire

import (
	"context"
	"encoding/hex"
	"errors"

	"google.golang.org/grpc/metadata"
)

const (
	// PluginName is the node attestor's name, and so the type of its selectors.
	PluginName = "tpmnode"

	// Version is the protocol version in AttestRequest.
	Version = 1

	// AgentKeyMetadata carries SHA-256 of the SPKI of the agent's CSR key (32
	// raw bytes) to the plugin on either side. SPIRE's plugin interface does
	// not show the CSR to plugins, so a stock SPIRE never sets it.
	AgentKeyMetadata = "rootlink-agent-key-bin"

	// HostVariable is set to HostAgent in the environment of an external plugin
	// by our own agent, which measures what it asks quotes for and so is served
	// the Quoter. It is no secret: whoever can start the plugin with it can also
	// open the TPM and the attestation key.
	HostVariable = "ROOTLINK_PLUGIN_HOST"
	HostAgent    = "rootlink-agent"

	// agentPath precedes the EK hash in an agent's SPIFFE ID.
	agentPath = "/spire/agent/" + PluginName + "/"
)

// Sizes in bytes.
const (
	NonceSize   = 32
	SecretSize  = 32 // what a credential holds; TPMs take no more than a SHA-256 digest
	KeyHashSize = 32
	HashSize    = 32
)

// ErrAgentKey means that the agent key metadata is present but malformed.
var ErrAgentKey = errors.New("malformed " + AgentKeyMetadata + " metadata")

// WithAgentKey adds the agent's key hash to an outgoing call of either plugin.
func WithAgentKey(ctx context.Context, keyHash [KeyHashSize]byte) context.Context {
	return metadata.AppendToOutgoingContext(ctx, AgentKeyMetadata, string(keyHash[:]))
}

// AgentKey reads the agent's key hash from an incoming call. Without one it
// returns zero bytes and false. Present but malformed, doubled, or all zero
// (which is how a proof says "hidden") is an error, never "absent": a host that
// meant to bind a key must not end up with an unbound proof.
func AgentKey(ctx context.Context) (keyHash [KeyHashSize]byte, bound bool, err error) {
	values := metadata.ValueFromIncomingContext(ctx, AgentKeyMetadata)
	switch {
	case len(values) == 0:
		return keyHash, false, nil
	case len(values) > 1 || len(values[0]) != KeyHashSize:
		return keyHash, false, ErrAgentKey
	}
	copy(keyHash[:], values[0])
	if keyHash == ([KeyHashSize]byte{}) {
		return keyHash, false, ErrAgentKey
	}
	return keyHash, true, nil
}

// AgentIDPath returns the path of the agent ID of a TPM.
func AgentIDPath(ekHash [HashSize]byte) string { return agentPath + hex.EncodeToString(ekHash[:]) }

// AgentID returns the SPIFFE ID of the agent on the TPM with this EK: a
// function of the hardware alone, so nobody can ask for another's.
func AgentID(trustDomain string, ekHash [HashSize]byte) string {
	return "spiffe://" + trustDomain + AgentIDPath(ekHash)
}

package attest

// EventLogClaims is what a replayed boot event log proves.
type EventLogClaims struct {
	SecureBoot *bool    // nil when the log proves neither
	Bank       string   // the bank it was replayed against
	Replayed   []uint32 // PCRs whose quoted value the log explains
}

// ReplayEventLog replays log to the quoted PCR values of the strongest bank.
// Every PCR it speaks for needs at least one event or its reset value.
func ReplayEventLog(log []byte, pcrs []PCRBank) (*EventLogClaims, error) {
	return nil, errNotImplemented
}

package nodeserver

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

const (
	// crowdWindow and crowdLimit: an honest agent attests at its start and at
	// half of its SVID's life. Two that share a TPM end each other's SVIDs and
	// so attest by turns, as fast as they can.
	crowdWindow = time.Minute
	crowdLimit  = 4

	// liveLife is how long a TPM is remembered after its last attestation.
	liveLife = time.Hour
)

// live watches for two agents on one TPM. The newer wins, as on the server,
// where a new SVID ends the old one.
type live struct {
	mu    sync.Mutex
	next  uint64               // guarded by mu: number of the next session
	nodes map[[32]byte]*recent // guarded by mu, by EK hash
	swept time.Time            // guarded by mu
}

// recent is what is remembered of one TPM.
type recent struct {
	newest uint64 // the highest number among finished sessions
	at     []time.Time
	keys   [][32]byte // agent keys, latest last; at most crowdLimit
}

func newLive() *live { return &live{nodes: map[[32]byte]*recent{}} }

// begin returns the number of a session whose challenge is about to be sent.
func (l *live) begin() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.next++
	return l.next
}

// finish records that session n of a TPM has proved everything. Only such
// sessions count: anybody can begin one with somebody's EK certificate. stale
// means that a newer session finished first. crowd, when not empty, says why it
// looks as if two agents shared the TPM.
func (l *live) finish(ek [32]byte, n uint64, agentKey [32]byte, now time.Time) (stale bool, crowd string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.swept) > liveLife || now.Before(l.swept) {
		for k, r := range l.nodes {
			if now.Sub(r.at[len(r.at)-1]) > liveLife {
				delete(l.nodes, k)
			}
		}
		l.swept = now
	}
	r := l.nodes[ek]
	if r == nil {
		r = new(recent)
		l.nodes[ek] = r
	}
	if n < r.newest {
		return true, ""
	}
	r.newest = n
	r.at = append(slices.DeleteFunc(r.at, func(t time.Time) bool { return now.Sub(t) > crowdWindow }), now)
	if len(r.at) >= crowdLimit {
		crowd = fmt.Sprintf("%d attestations within %v: two agents seem to share this TPM", len(r.at), crowdWindow)
		r.at = r.at[len(r.at)-1:] // one alarm for each such burst
	}
	if agentKey != [32]byte{} {
		// A key that comes back after another one belongs to an agent that
		// never went away.
		if i := slices.Index(r.keys, agentKey); i >= 0 && i < len(r.keys)-1 {
			crowd = "an earlier agent's key is back: two agents share this TPM"
		}
		r.keys = append(slices.DeleteFunc(r.keys, func(k [32]byte) bool { return k == agentKey }), agentKey)
		if len(r.keys) > crowdLimit {
			r.keys = r.keys[1:]
		}
	}
	return false, crowd
}

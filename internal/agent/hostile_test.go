package agent

import (
	"fmt"
	"strings"
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// maxSynced is what an agent keeps of its entries, in bytes.
const maxSynced = 256 << 20

// A server that sends entries for ever must not fill the machine's memory: what
// was synced before stays in force.
func TestRefusesEndlessSync(t *testing.T) {
	huge := strings.Repeat("x", 12<<20)
	type message = entryv1.SyncAuthorizedEntriesResponse
	for name, page := range map[string]func(n int) *message{
		"entries": func(n int) *message {
			return &message{More: true, Entries: []*types.Entry{{Id: fmt.Sprint(n), Hint: huge}}}
		},
		"one entry again and again": func(int) *message {
			return &message{More: true, Entries: []*types.Entry{{Id: "1", Hint: huge}}}
		},
		"revisions": func(n int) *message {
			return &message{More: true, EntryRevisions: []*entryv1.EntryRevision{{Id: fmt.Sprint(n) + huge}}}
		},
		"selectors": func(int) *message {
			e := &types.Entry{Id: "1"}
			for range 2 << 20 {
				e.Selectors = append(e.Selectors, new(types.Selector))
			}
			return &message{Entries: []*types.Entry{e}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newFakeServer(t)
			s.addEntry("/w", selfUID())
			s.start()
			a := startAgent(t, s)
			a.waitReady()
			if _, _, err := a.fetch(); err != nil {
				t.Fatal(err)
			}
			const most = maxSynced/(12<<20) + 8 // what is on its way included
			taken := make(chan int, 1)
			s.with(func() {
				s.flood = func(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
					n, more := 0, true
					for more && n < 2*most {
						p := page(n)
						more = p.More
						if err := stream.Send(p); err != nil {
							break
						}
						n++
					}
					<-stream.Context().Done()
					select {
					case taken <- n:
					default:
					}
					return stream.Context().Err()
				}
			})
			if n := <-taken; n > most {
				t.Errorf("%d messages were taken", n)
			}
			eventually(t, "a line about the sync", func() bool { return strings.Contains(a.log.String(), "sync failed") })
			if _, _, err := a.fetch(); err != nil {
				t.Errorf("what was synced is lost: %v", err)
			}
			s.with(func() { s.flood = nil })
			eventually(t, "a sync", func() bool { return strings.Contains(a.log.String(), "sync works again") })
		})
	}
}

// SPIRE's servers take an entry that federates with its own trust domain, and
// give nobody that bundle as another's: the sync must not fail for it.
func TestOwnTrustDomainIsNotFederated(t *testing.T) {
	s := newFakeServer(t)
	id := s.addEntry("/w", selfUID())
	other := newFakeServer(t)
	s.with(func() {
		for _, e := range s.entries {
			if e.Id == id {
				e.FederatesWith = []string{testTD}
			}
		}
		s.federated = map[string][]byte{testTD: other.ca.Raw}
	})
	s.start()
	a := startAgent(t, s)
	a.waitReady()
	_, resp, err := a.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(resp.FederatedBundles); n != 0 {
		t.Errorf("%d federated bundles", n)
	}
}

// The authorities of one trust domain must not come in another's name.
func TestRefusesBundleOfAnotherName(t *testing.T) {
	s := newFakeServer(t)
	s.federate(s.addEntry("/w", selfUID()), "partner.test")
	s.with(func() { s.misnamed = "elsewhere.test" })
	s.start()
	a := startAgent(t, s)
	eventually(t, "a line about the sync", func() bool { return strings.Contains(a.log.String(), "instead of") })
	s.with(func() { s.misnamed = "" })
	a.waitReady()
	_, resp, err := a.fetch()
	if err != nil || len(resp.FederatedBundles) != 1 {
		t.Fatalf("%v %v", resp, err)
	}
}

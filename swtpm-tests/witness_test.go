package stories

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"net/http/httptest"
	"os"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rootlink/rootlink/internal/forge"
)

// witnesses of all stories that run, by the path of their key file.
var witnesses sync.Map

// witness start NAME | away NAME | back NAME
//
// start begins a witness at a free port and writes NAME.vkey, its C2SP verifier
// key, and NAME.policy, by which a log needs its cosignature.
func cmdWitness(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: witness start|away|back NAME")
	}
	file := ts.MkAbs(args[1] + ".vkey")
	if args[0] != "start" {
		w, ok := witnesses.Load(file)
		if !ok {
			ts.Fatalf("no witness %q", args[1])
		}
		w.(*forge.WitnessServer).Away.Store(args[0] == "away")
		return
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	ts.Check(err)
	w := &forge.WitnessServer{LogWitness: &forge.LogWitness{Name: args[1] + ".witness.example", Key: key, Time: time.Now()}}
	web := httptest.NewServer(w)
	witnesses.Store(file, w)
	ts.Defer(func() {
		witnesses.Delete(file)
		web.Close()
		ts.Check(w.Refused())
	})
	vkey := w.Info().Key
	ts.Check(os.WriteFile(file, []byte(vkey+"\n"), 0o600))
	policy := fmt.Sprintf("witness %s %s %s\nquorum %s\n", args[1], vkey, web.URL, args[1])
	ts.Check(os.WriteFile(ts.MkAbs(args[1]+".policy"), []byte(policy), 0o600))
}

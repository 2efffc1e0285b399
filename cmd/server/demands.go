package main

import (
	"strings"

	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/link"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// demandFlags are the flags of trust export that demand something of what ran
// in a step.
func demandFlags(fs *pflag.FlagSet) func() ([]*adminv1.StepDemand, error) {
	var lists, caches, logged []string
	fs.StringArrayVar(&lists, "executables", nil, "`ID=FILE` with the only programs that may run in steps of this SPIFFE ID, as rootlink inspect --executables prints them (repeatable)")
	fs.StringArrayVar(&caches, "caches-per-job", nil, "SPIFFE `ID` whose steps must begin with empty caches (repeatable)")
	fs.StringArrayVar(&logged, "logged", nil, "`ID=LIST` of what of this SPIFFE ID must be in a known log: signature, ak, authority and attestation_ca (repeatable)")
	return func() (out []*adminv1.StepDemand, err error) {
		for _, l := range lists {
			id, file, ok := strings.Cut(l, "=")
			if !ok {
				return nil, cli.Usage("such as --executables spiffe://example.org/build=tools.txt", "--executables %q is not SPIFFE-ID=FILE", l)
			}
			b, err := cli.ReadInput(file, link.MaxTrust)
			if err != nil {
				return nil, err
			}
			hashes, err := link.ParseToolList(b)
			if err != nil {
				return nil, cli.Usage("`rootlink inspect BUNDLE --executables` prints such a list", "%s: %w", file, err)
			}
			out = append(out, &adminv1.StepDemand{SpiffeId: id, Executables: hashes})
		}
		for _, id := range caches {
			out = append(out, &adminv1.StepDemand{SpiffeId: id, CachesPerJob: true})
		}
		for _, l := range logged {
			id, what, ok := strings.Cut(l, "=")
			if !ok || what == "" {
				return nil, cli.Usage("such as --logged spiffe://example.org/build=signature,ak", "--logged %q is not SPIFFE-ID=LIST", l)
			}
			out = append(out, &adminv1.StepDemand{SpiffeId: id, Logged: strings.Split(what, ",")})
		}
		return out, nil
	}
}

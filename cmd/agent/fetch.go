package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/attest"
)

// svidView is what `api fetch x509` prints for each SVID. The key is never
// printed, only written with --write.
type svidView struct {
	SPIFFEID  string   `json:"spiffe_id"`
	Hint      string   `json:"hint,omitempty"`
	NotBefore string   `json:"not_before"`
	NotAfter  string   `json:"not_after"`
	Serial    string   `json:"serial"`
	Evidence  bool     `json:"evidence"`
	Chain     []string `json:"x509_svid_pem"`
	Bundle    []string `json:"bundle_pem"`
	Files     []string `json:"files,omitempty"`
}

func fetchX509Command() *cobra.Command {
	c := &cobra.Command{
		Use: "x509", Short: "Fetch the X.509-SVIDs of this program (identified by its own hash)", Args: cobra.NoArgs,
		Long: "Fetch X.509-SVIDs as a workload does. The workload is this very program: an entry must match rootlink-agent's own executable.",
	}
	socket := socketFlag(c)
	dir := c.Flags().String("write", "", "write svid.N.pem, svid.N.key and bundle.N.pem into this directory")
	watch := c.Flags().Bool("watch", false, "go on, and print each update")
	c.RunE = func(c *cobra.Command, _ []string) error { return fetchX509(c, *socket, *dir, *watch) }
	return c
}

func fetchX509(c *cobra.Command, socket, dir string, watch bool) error {
	ctx := c.Context()
	if !watch {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, clientTimeout)
		defer cancel()
	}
	conn, err := dial(ctx, socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx = withHeader(ctx)
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err != nil {
		return explain(err)
	}
	written := 0 // SVIDs of the message before
	for {
		resp, err := stream.Recv()
		if watch && (errors.Is(err, io.EOF) || c.Context().Err() != nil) {
			return nil
		}
		if err != nil {
			return explain(err)
		}
		views, err := readSVIDs(resp)
		if err != nil {
			return cli.Hint(fmt.Errorf("the agent's answer is not valid: %w", err), "look whether rootlink-agent serves this socket")
		}
		if dir != "" {
			if err := writeSVIDs(resp, views, dir, written); err != nil {
				return err
			}
			written = len(views)
		}
		if err := emit(c, map[string]any{"svids": views}, func(w io.Writer) { printSVIDs(w, views) }); err != nil || !watch {
			return err
		}
	}
}

// explain makes a hint of the one in the agent's message.
func explain(err error) error {
	msg, hint := cli.CutHint(status.Convert(err).Message())
	if hint == "" {
		return cli.FromRPC(err)
	}
	return cli.Hint(errors.New(msg), hint)
}

// readSVIDs reads one message. Each field that SPIFFE Workload API §5.2.1
// demands has to be there, or the message as a whole is discarded.
func readSVIDs(resp *workloadpb.X509SVIDResponse) ([]svidView, error) {
	if len(resp.GetSvids()) == 0 {
		return nil, errors.New("no SVID in it")
	}
	var out []svidView
	for _, s := range resp.GetSvids() {
		svid, err := x509svid.ParseRaw(s.GetX509Svid(), s.GetX509SvidKey())
		if err != nil {
			return nil, err
		}
		if s.GetSpiffeId() != svid.ID.String() {
			return nil, fmt.Errorf("the SVID of %q comes as that of %q", svid.ID, s.GetSpiffeId())
		}
		bundle, err := x509.ParseCertificates(s.GetBundle())
		if err != nil {
			return nil, fmt.Errorf("bundle: %w", err)
		}
		if len(bundle) == 0 {
			return nil, errors.New("the bundle is empty")
		}
		leaf := svid.Certificates[0]
		_, eerr := attest.FromCertificate(leaf)
		out = append(out, svidView{
			SPIFFEID: svid.ID.String(), Hint: s.GetHint(), Serial: fmt.Sprintf("%x", leaf.SerialNumber),
			NotBefore: leaf.NotBefore.UTC().Format(time.RFC3339), NotAfter: leaf.NotAfter.UTC().Format(time.RFC3339),
			Evidence: eerr == nil, Chain: pems(svid.Certificates), Bundle: pems(bundle),
		})
	}
	return out, nil
}

// writeSVIDs writes the files of a message and removes those of SVIDs that were
// in the one before, of so many SVIDs, and are no more: what a message leaves
// out is withdrawn (SPIFFE Workload API §4.4).
func writeSVIDs(resp *workloadpb.X509SVIDResponse, views []svidView, dir string, before int) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for i := range views {
		v := &views[i]
		key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: resp.GetSvids()[i].GetX509SvidKey()})
		for j, f := range []struct {
			data []byte
			perm os.FileMode
		}{
			{[]byte(strings.Join(v.Bundle, "")), 0o644},
			{key, 0o600},
			{[]byte(strings.Join(v.Chain, "")), 0o644},
		} {
			path := filepath.Join(dir, fmt.Sprintf(svidFiles[j], i))
			if err := files.Write(path, f.data, f.perm); err != nil {
				return err
			}
			v.Files = append(v.Files, path)
		}
	}
	for i := len(views); i < before; i++ {
		for _, name := range svidFiles {
			if err := os.Remove(filepath.Join(dir, fmt.Sprintf(name, i))); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// svidFiles are the files of the SVID with a number, in the order of writing.
var svidFiles = [...]string{"bundle.%d.pem", "svid.%d.key", "svid.%d.pem"}

func pems(cs []*x509.Certificate) []string {
	var out []string
	for _, c := range cs {
		out = append(out, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})))
	}
	return out
}

func printSVIDs(w io.Writer, views []svidView) {
	var b bytes.Buffer
	for _, v := range views {
		evidence := "none"
		if v.Evidence {
			evidence = "embedded"
		}
		fmt.Fprintf(&b, "SPIFFE ID  %s\nvalid      %s to %s\nserial     %s\nevidence   %s\n", v.SPIFFEID, v.NotBefore, v.NotAfter, v.Serial, evidence)
		if v.Hint != "" {
			fmt.Fprintf(&b, "hint       %s\n", v.Hint)
		}
		for _, f := range slices.Backward(v.Files) {
			fmt.Fprintf(&b, "written    %s\n", f)
		}
		b.WriteByte('\n')
	}
	w.Write(bytes.TrimSuffix(b.Bytes(), []byte("\n")))
}

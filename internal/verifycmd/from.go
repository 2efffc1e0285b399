package verifycmd

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/oci"
	"github.com/rootlink/rootlink/pkg/link"
)

// fetched are the bundles that --from found, in a directory of their own until
// they are judged.
type fetched struct {
	dir   string            // "" until there is one
	names map[string]string // path there → what people read
	// artifacts are those that an archive holds the digests of.
	artifacts []link.Artifact
}

// orArchived is what is to be compared: the files that were named or, when none
// was, what the archive says of those that were verified when it was made.
func (f *fetched) orArchived(given []link.Artifact) []link.Artifact {
	if len(given) > 0 {
		return given
	}
	return f.artifacts
}

func (f *fetched) remove() {
	if f.dir != "" {
		os.RemoveAll(f.dir)
	}
}

// fetch adds to args the bundles that are stored beside the images of --from,
// and the images themselves, by digest: bundles that are good but about another
// image would otherwise be compared with nothing. Bundles of another predicate
// type than is asked for are not taken: who may push may attach what he likes.
func (o *verifyOptions) fetch(ctx context.Context, wantType string, args []string) (*fetched, []string, error) {
	f := &fetched{names: map[string]string{}}
	if o.plainHTTP {
		for i := range args {
			args[i] = oci.Plain(args[i])
		}
	}
	for i, ref := range o.from {
		if o.plainHTTP {
			ref = oci.Plain(ref)
		}
		got, err := oci.Fetch(ctx, ref)
		if err != nil {
			return f, nil, placeError(err)
		}
		if f.dir == "" {
			if f.dir, err = os.MkdirTemp("", "rootlink-"); err != nil {
				return f, nil, err
			}
		}
		dir := filepath.Join(f.dir, strconv.Itoa(i))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return f, nil, err
		}
		taken := 0
		for _, it := range got.Items {
			path := filepath.Join(dir, it.Name)
			if err := files.Write(path, it.Data, 0o600); err != nil {
				return f, nil, err
			}
			if strings.HasSuffix(it.Name, link.BundleSuffix) && oci.PredicateType(it.Data) == wantType {
				args = append(args, path)
				f.names[path] = it.Name
				taken++
			}
		}
		if taken == 0 {
			return f, nil, cli.Fail(cli.ExitPolicy, fmt.Errorf("not verified: %s: none of the %d bundles there is of type %s", ref, len(got.Bundles()), wantType),
				nothingOfType(len(got.Bundles())))
		}
		if got.Image != "" {
			args = append(args, oci.Pinned(ref, got.Digest))
		}
	}
	return f, args, nil
}

// rename gives the links the names that people know.
func (f *fetched) rename(links []link.LinkInput) {
	for i, l := range links {
		if n, ok := f.names[l.Name]; ok {
			links[i].Name = n
		}
	}
}

// digestImage is digestArtifact of an image that is named by reference.
func digestImage(ref string) (link.Artifact, error) {
	_, digest, err := oci.Resolve(context.Background(), ref)
	if err != nil {
		return link.Artifact{}, placeError(err)
	}
	return link.Artifact{Name: ref, Digest: map[string]string{"sha256": digest}}, nil
}

func placeError(err error) error {
	switch {
	case errors.Is(err, oci.ErrDigest), errors.Is(err, oci.ErrForeignReferrer):
		return cli.Fail(cli.ExitCrypto, fmt.Errorf("not verified: %w", err), "somebody exchanged it, or it was damaged: get it again from where it was made")
	case errors.Is(err, oci.ErrRef), errors.Is(err, oci.ErrAmbiguous):
		return cli.Fail(cli.ExitUsage, err, "such as oci-layout:DIR, oci:HOST/REPOSITORY:TAG, or with @sha256:… for one image of several")
	case errors.Is(err, oci.ErrPlainHTTP):
		return cli.Hint(err, "if that registry is meant to have no TLS, say --plain-http")
	case errors.As(err, new(*url.Error)):
		return cli.Hint(err, "is that the registry's address, and can it be reached from here?")
	}
	return err
}

func nothingOfType(others int) string {
	if others == 0 {
		return "`rootlink attach` stores bundles beside an image"
	}
	return "--type says which kind of statement is expected: `rootlink fetch` and `rootlink inspect` show which there are"
}

// asIf reads --at. The present is kept: a time that nobody attests is worth
// nothing once it is past.
func (o *verifyOptions) asIf(clock time.Time) (now, present time.Time, err error) {
	if o.at == "" {
		return clock, time.Time{}, nil
	}
	if now, err = time.Parse(time.RFC3339, o.at); err != nil {
		return now, present, cli.Usage("such as 2030-05-01T12:00:00Z", "--at: %w", err)
	}
	if o.vsa.out != "" {
		return now, present, cli.Usage("verify without --at for a summary", "--at with --vsa: a summary says that something was verified now")
	}
	return now, clock, nil
}

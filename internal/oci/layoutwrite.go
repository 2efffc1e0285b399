package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// push writes the blobs, then the entry in index.json. A crash between leaves
// blobs that nothing names, which is no harm.
func (l *layout) push(_ context.Context, it Item, subject ocispec.Descriptor) (string, bool, error) {
	manifest, layer, kind, err := referrer(it, subject)
	if err != nil {
		return "", false, err
	}
	unlock, err := l.lock()
	if err != nil {
		return "", false, err
	}
	defer unlock()
	d := digestDescriptor(manifest)
	for _, b := range []struct {
		digest digest.Digest
		data   []byte
	}{{ocispec.DescriptorEmptyJSON.Digest, ocispec.DescriptorEmptyJSON.Data}, {layer.Digest, it.Data}, {d, manifest}} {
		if err := l.writeBlob(b.digest, b.data); err != nil {
			return "", false, err
		}
	}
	existed, err := l.addEntry(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: kind, Digest: d, Size: int64(len(manifest))})
	return string(d), existed, err
}

// lock holds the directory against another attach, without a file of its own in it.
func (l *layout) lock() (unlock func(), err error) {
	dir, err := l.root.Open(".")
	if err != nil {
		return nil, err
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(dir.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock the layout: %w", err)
	}
	return func() { dir.Close() }, nil
}

// writeBlob leaves a blob alone that is there and good.
func (l *layout) writeBlob(d digest.Digest, data []byte) error {
	name, err := blobPath(d)
	if err != nil {
		return err
	}
	if _, err := l.blob(d, int64(len(data))); err == nil {
		return nil
	}
	if err := l.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	return l.replace(name, data)
}

// replace writes by temporary file and rename, inside the layout whatever its
// symbolic links say.
func (l *layout) replace(name string, data []byte) error {
	temp := fmt.Sprintf("%s.tmp%d", name, os.Getpid())
	f, err := l.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = l.root.Rename(temp, name)
	}
	if err != nil {
		return errors.Join(err, l.root.Remove(temp))
	}
	return nil
}

// addEntry adds to index.json and keeps everything else that is in it.
func (l *layout) addEntry(d ocispec.Descriptor) (existed bool, err error) {
	idx, err := l.index()
	if err != nil {
		return false, err
	}
	for _, e := range idx.Manifests {
		if e.Digest == d.Digest {
			return true, nil
		}
	}
	if len(idx.Manifests) == maxEntries {
		return false, fmt.Errorf("index.json: %w of %d entries", ErrTooLarge, maxEntries)
	}
	raw, err := l.read(ocispec.ImageIndexFile, maxManifest)
	if err != nil {
		return false, err
	}
	var all map[string]json.RawMessage
	var list []json.RawMessage
	if err := json.Unmarshal(raw, &all); err != nil {
		return false, fmt.Errorf("%w: index.json: %w", ErrMalformed, err)
	}
	if m := all["manifests"]; m != nil {
		if err := json.Unmarshal(m, &list); err != nil {
			return false, fmt.Errorf("%w: index.json: %w", ErrMalformed, err)
		}
	}
	entry, err := json.Marshal(d)
	if err != nil {
		return false, err
	}
	if all["manifests"], err = json.Marshal(append(list, entry)); err != nil {
		return false, err
	}
	out, err := json.Marshal(all)
	if err != nil {
		return false, err
	}
	return false, l.replace(ocispec.ImageIndexFile, out)
}

// referrers looks at every manifest that index.json names: a layout has no other
// list of them.
func (l *layout) referrers(ctx context.Context, subject ocispec.Descriptor, f func(found) error) error {
	idx, err := l.index()
	if err != nil {
		return err
	}
	n := 0
	for _, e := range idx.Manifests {
		if err := ctx.Err(); err != nil {
			return err
		}
		m, _, err := l.document(e.Digest, e.MediaType)
		if errors.Is(err, ErrMalformed) {
			continue // of a kind that we do not know, so none of ours
		}
		if err != nil {
			return err
		}
		if m.Subject == nil || m.Subject.Digest != subject.Digest || !known(m.kind()) {
			continue
		}
		if n++; n > maxReferrers {
			return errEnough
		}
		r := found{digest: e.Digest, kind: m.kind()}
		layer, err := m.content()
		if r.problem = err; err == nil {
			r.title = layer.Annotations[ocispec.AnnotationTitle]
			if r.data, err = l.blob(layer.Digest, layer.Size); err != nil {
				return err
			}
		}
		if err := f(r); err != nil {
			return err
		}
	}
	return nil
}

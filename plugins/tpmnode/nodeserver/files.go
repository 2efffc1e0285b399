package nodeserver

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
)

const maxPinsFile = 64 << 20 // bytes

// pinsFile is the name of the pins in data_dir.
const pinsFile = "tpmnode-pins.json"

// filePins is the PinStore of a stock SPIRE. It writes the whole file anew for
// each new TPM, which happens once in a machine's life.
type filePins struct {
	path string
	mu   sync.Mutex
	data pinData // guarded by mu; equal to the file's content
}

type pinData struct {
	Version int               `json:"version"`
	AKs     map[string]string `json:"ak_by_ek"`  // hex SHA-256 of the EK → hex AK name
	TPMs    map[string]string `json:"ek_by_tpm"` // hex name of the storage key → hex SHA-256 of the EK
}

func openPins(path string) (*filePins, error) {
	p := &filePins{path: path, data: pinData{Version: 1, AKs: map[string]string{}, TPMs: map[string]string{}}}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	b, err := files.Read(path, maxPinsFile)
	if err != nil {
		return nil, fmt.Errorf("pins: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	// An unreadable file is not an empty one: every pin would be open again.
	var data pinData
	err = d.Decode(&data)
	if err == nil && (data.Version != 1 || data.AKs == nil || data.TPMs == nil || d.More()) {
		err = errors.New("not the pins of this version")
	}
	if err != nil {
		return nil, cli.Hint(fmt.Errorf("pins: %s: %w", path, err),
			"restore it from a backup; removing it lets every TPM be pinned anew")
	}
	p.data = data
	return p, nil
}

func (p *filePins) PinAK(_ context.Context, ek [32]byte, akName []byte, replace bool) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, v := hex.EncodeToString(ek[:]), hex.EncodeToString(akName)
	was, known := p.data.AKs[k]
	if known && (was == v || !replace) {
		return hex.DecodeString(was)
	}
	if err := p.set(p.data.AKs, k, v); err != nil {
		return nil, err
	}
	if !known {
		was = v
	}
	return hex.DecodeString(was)
}

func (p *filePins) PinTPM(_ context.Context, parentName []byte, ek [32]byte) ([32]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, v := hex.EncodeToString(parentName), hex.EncodeToString(ek[:])
	was, known := p.data.TPMs[k]
	if !known {
		if err := p.set(p.data.TPMs, k, v); err != nil {
			return [32]byte{}, err
		}
		was = v
	}
	raw, err := hex.DecodeString(was)
	if err != nil || len(raw) != 32 {
		return [32]byte{}, fmt.Errorf("pins: %s: malformed EK hash %q", p.path, was)
	}
	return [32]byte(raw), nil
}

// set changes m, a map of p.data, and undoes that when it cannot be saved. The
// caller holds mu.
func (p *filePins) set(m map[string]string, k, v string) error {
	was, known := m[k]
	m[k] = v
	b, err := json.MarshalIndent(p.data, "", "  ")
	if err == nil {
		err = files.Write(p.path, append(b, '\n'), 0o600)
	}
	if err != nil {
		if delete(m, k); known {
			m[k] = was
		}
		return fmt.Errorf("pins: %w", err)
	}
	return nil
}

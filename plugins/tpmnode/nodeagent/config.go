package nodeagent

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/token"

	"github.com/rootlink/rootlink/internal/tpm"
)

// hclConfig is the plugin's configuration as written.
type hclConfig struct {
	TPMPath           string                 `hcl:"tpm_path"`
	DataDir           string                 `hcl:"data_dir"`
	QuoterSocket      string                 `hcl:"quoter_socket"`
	AllowSharedDevice bool                   `hcl:"allow_shared_device"`
	EventLogPath      string                 `hcl:"event_log_path"`
	IMALogPath        string                 `hcl:"ima_log_path"`
	EKTypes           []string               `hcl:"ek_types"`
	UnusedKeys        map[string][]token.Pos `hcl:",unusedKeyPositions"`
}

// config is a checked configuration.
type config struct {
	trustDomain  string
	device       tpm.Options // without Log
	eventLogPath string
	imaLogPath   string
}

const defaultDevice = "/dev/tpmrm0"

// parseConfig fails on everything it does not understand: a misspelt key must
// not leave its default in force unnoticed.
func parseConfig(trustDomain, text string) (*config, error) {
	var h hclConfig
	if err := hcl.Decode(&h, text); err != nil {
		return nil, fmt.Errorf("cannot read the configuration: %w", err)
	}
	if len(h.UnusedKeys) > 0 {
		return nil, fmt.Errorf("unknown configuration keys: %s", strings.Join(slices.Sorted(maps.Keys(h.UnusedKeys)), ", "))
	}
	if trustDomain == "" {
		return nil, errors.New("the host gave no trust domain")
	}
	if h.QuoterSocket != "" {
		return nil, errors.New("quoter_socket is not supported yet: this version serves its quoter to the rootlink agent only")
	}
	if h.DataDir == "" {
		return nil, errors.New("data_dir is required: it keeps the attestation key between runs")
	}
	if !filepath.IsAbs(h.DataDir) {
		return nil, fmt.Errorf("data_dir %q is not an absolute path", h.DataDir)
	}
	c := &config{
		trustDomain:  trustDomain,
		eventLogPath: cmp.Or(h.EventLogPath, tpm.DefaultEventLogPath),
		imaLogPath:   cmp.Or(h.IMALogPath, tpm.DefaultIMALogPath),
		device: tpm.Options{
			Address:           cmp.Or(h.TPMPath, defaultDevice),
			DataDir:           h.DataDir,
			AllowSharedDevice: h.AllowSharedDevice,
		},
	}
	if _, err := tpm.ParseAddress(c.device.Address); err != nil {
		return nil, fmt.Errorf("tpm_path: %w", err)
	}
	for _, t := range h.EKTypes {
		if !slices.Contains(tpm.DefaultEKTypes(), tpm.EKType(t)) {
			return nil, fmt.Errorf("ek_types: unknown type %q, known are %v", t, tpm.DefaultEKTypes())
		}
		if slices.Contains(c.device.EKTypes, tpm.EKType(t)) {
			return nil, fmt.Errorf("ek_types: %q twice", t)
		}
		c.device.EKTypes = append(c.device.EKTypes, tpm.EKType(t))
	}
	return c, nil
}

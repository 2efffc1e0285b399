package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
)

// tpmView is the output of `tpm info`. Nothing of it is proved.
type tpmView struct {
	Device       string   `json:"device"`
	EKHash       string   `json:"ek_sha256"`
	AgentID      string   `json:"agent_id"`
	EKType       string   `json:"ek_type"`
	EKCert       bool     `json:"ek_certificate"`
	EKIssuer     string   `json:"ek_issuer,omitempty"`
	Manufacturer string   `json:"manufacturer"`
	Vendor       string   `json:"vendor,omitempty"`
	Firmware     string   `json:"firmware"`
	Software     bool     `json:"software"`
	Banks        []string `json:"pcr_banks"`
	Resets       uint32   `json:"reset_count"`
	Restarts     uint32   `json:"restart_count"`
	Lockout      bool     `json:"in_lockout"`
}

func tpmInfoCommand() *cobra.Command {
	c := &cobra.Command{Use: "info", Short: "Print this machine's EK hash, agent ID and TPM", Args: cobra.NoArgs}
	device := c.Flags().String("tpm", defaultTPM, "TPM: /dev/tpmrm0, unix:PATH or tcp:HOST:PORT")
	domain := c.Flags().String("trust-domain", "", "trust domain, to print the whole agent ID")
	c.RunE = func(c *cobra.Command, _ []string) error {
		v, err := tpmInfo(c, *device, *domain)
		if err != nil {
			return err
		}
		return emit(c, v, func(w io.Writer) { printTPM(w, v) })
	}
	return c
}

func tpmInfo(c *cobra.Command, device, domain string) (v *tpmView, err error) {
	if domain != "" {
		if td, err := spiffeid.TrustDomainFromString(domain); err != nil || td.Name() != domain {
			return nil, cli.Usage("a trust domain is a name such as example.org", "trust domain %q is not valid", domain)
		}
	}
	defer func() {
		switch h := tpm.Hint(err); {
		case errors.Is(err, tpm.ErrAddress):
			err = cli.Fail(cli.ExitUsage, err, h)
		case h != "":
			err = cli.Hint(err, h)
		}
	}()
	// Looking changes nothing, so a shared device is no reason to refuse.
	d, err := tpm.Open(tpm.Options{Address: device, AllowSharedDevice: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	defer d.Close()
	info, err := d.Info(c.Context())
	if err != nil {
		return nil, err
	}
	ek, err := d.EK(c.Context())
	if err != nil {
		return nil, err
	}
	hash := ek.Hash()
	v = &tpmView{
		Device: d.Address().String(), EKHash: fmt.Sprintf("%x", hash), EKType: string(ek.Type), EKCert: len(ek.Chain) > 0,
		Manufacturer: info.Manufacturer, Vendor: info.VendorString, Firmware: info.Firmware, Software: info.Software,
		Banks: info.Banks, Resets: info.ResetCount, Restarts: info.RestartCount, Lockout: info.InLockout,
		AgentID: wire.AgentIDPath(hash),
	}
	if domain != "" {
		v.AgentID = wire.AgentID(domain, hash)
	}
	if v.EKCert {
		if cert, err := x509.ParseCertificate(ek.Chain[0]); err == nil {
			v.EKIssuer = cert.Issuer.String()
		}
	}
	return v, nil
}

func printTPM(w io.Writer, v *tpmView) {
	kind := "hardware"
	if v.Software {
		kind = "SOFTWARE: it protects nothing from this machine's root"
	}
	cert := "none: an operator must put the EK hash on the server's allow-list"
	if v.EKCert {
		cert = v.EKType + ", issued by " + v.EKIssuer
	}
	rows := [][2]string{
		{"device", v.Device},
		{"EK hash", v.EKHash},
		{"agent ID", v.AgentID},
		{"EK certificate", cert},
		{"manufacturer", strings.TrimSpace(v.Manufacturer + " " + v.Vendor)},
		{"firmware", v.Firmware},
		{"kind", kind},
		{"PCR banks", strings.Join(v.Banks, ", ")},
		{"resets", fmt.Sprintf("%d, restarts %d", v.Resets, v.Restarts)},
	}
	if v.Lockout {
		rows = append(rows, [2]string{"lockout", "the TPM is in dictionary attack lockout"})
	}
	for _, r := range rows {
		fmt.Fprintf(w, "%-15s %s\n", r[0], r[1])
	}
}

package link

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// BuildTypeStep is the build type of provenance that is made from a link; the
// page it names says what its parameters mean.
const BuildTypeStep = "https://github.com/rootlink/rootlink/blob/main/docs/predicates.md#build-type-step-v1"

type slsaProvenance struct {
	BuildDefinition struct {
		BuildType            string           `json:"buildType"`
		ExternalParameters   map[string]any   `json:"externalParameters"`
		InternalParameters   map[string]any   `json:"internalParameters,omitempty"`
		ResolvedDependencies []slsaDependency `json:"resolvedDependencies,omitempty"`
	} `json:"buildDefinition"`
	RunDetails struct {
		Builder struct {
			ID      string            `json:"id"`
			Version map[string]string `json:"version,omitempty"`
		} `json:"builder"`
		Metadata struct {
			InvocationID string    `json:"invocationId"`
			StartedOn    time.Time `json:"startedOn,omitzero"`
			FinishedOn   time.Time `json:"finishedOn,omitzero"`
		} `json:"metadata"`
		Byproducts []slsaDependency `json:"byproducts,omitempty"`
	} `json:"runDetails"`
}

type slsaDependency struct {
	URI    string            `json:"uri,omitempty"`
	Name   string            `json:"name,omitempty"`
	Digest map[string]string `json:"digest,omitempty"`
}

// UnverifiedProvenance writes an SLSA provenance v1 predicate of the bundle's
// link: what the link says, in other words, and as unverified as it. The step
// must have ended well, since provenance has no place to say otherwise.
func (b *Bundle) UnverifiedProvenance() ([]byte, error) {
	s, err := b.UnverifiedStatement()
	if err != nil {
		return nil, err
	}
	if c := s.Byproducts.ExitCode; c == nil || *c != 0 || s.Byproducts.Signal != "" {
		return nil, malformed("the step did not end well, so nothing came out of it")
	}
	if len(b.leaf.URIs) != 1 {
		return nil, malformed("the certificate has %d URIs, not one", len(b.leaf.URIs))
	}
	var p slsaProvenance
	d := &p.BuildDefinition
	d.BuildType = BuildTypeStep
	command := s.Command
	if command == nil {
		command = []string{}
	}
	d.ExternalParameters = map[string]any{"step": s.Step, "command": command}
	if g := s.Environment.Git; g != nil && g.Commit != "" {
		source := map[string]any{"commit": g.Commit}
		if g.Remote != "" {
			source["repository"] = g.Remote
		}
		if g.Dirty != nil {
			source["dirty"] = *g.Dirty
		}
		d.ExternalParameters["source"] = source
		d.ResolvedDependencies = append(d.ResolvedDependencies, slsaDependency{
			URI: gitURI(g), Name: "source", Digest: map[string]string{"gitCommit": g.Commit},
		})
	}
	d.InternalParameters = map[string]any{}
	for name, v := range map[string]any{"environment": s.Environment.Variables, "ci": s.Environment.CI} {
		if m := v.(map[string]string); len(m) > 0 {
			d.InternalParameters[name] = m
		}
	}
	for name, v := range map[string]string{"os": s.Environment.OS, "arch": s.Environment.Arch, "workdir": s.Environment.WorkDir} {
		if v != "" {
			d.InternalParameters[name] = v
		}
	}
	for _, m := range s.Materials {
		d.ResolvedDependencies = append(d.ResolvedDependencies, slsaDependency{URI: m.URI, Name: m.Name, Digest: m.Digest})
	}
	run := &p.RunDetails
	run.Builder.ID = b.leaf.URIs[0].String()
	if r := s.Environment.Recorder; r != "" {
		run.Builder.Version = map[string]string{"rootlink": r}
	}
	// The digest that the TPM committed to is the run's own name.
	digest := b.payloadDigest()
	run.Metadata.InvocationID = "sha256:" + hex.EncodeToString(digest[:])
	run.Metadata.StartedOn, run.Metadata.FinishedOn = s.Byproducts.Started, s.Byproducts.Finished
	for _, e := range s.Byproducts.Executables {
		run.Byproducts = append(run.Byproducts, slsaDependency{Name: strings.TrimSpace(e.Role + " " + e.Path), Digest: e.Digest})
	}
	out, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return nil, malformed("%w", err)
	}
	if err := CheckPredicateForm(TypeSLSAProvenance, out); err != nil {
		return nil, err
	}
	return append(out, '\n'), nil
}

// gitURI is the source in the form of SPDX download locations, which SLSA
// takes; without a remote it is only a name.
func gitURI(g *Git) string {
	remote := g.Remote
	switch {
	case remote == "":
		return ""
	case strings.HasPrefix(remote, "git+"):
	case strings.Contains(remote, "://"):
		remote = "git+" + remote
	case strings.Contains(remote, ":"): // scp's form
		host, path, _ := strings.Cut(remote, ":")
		remote = "git+ssh://" + host + "/" + strings.TrimPrefix(path, "/")
	default:
		return ""
	}
	return fmt.Sprintf("%s@%s", remote, g.Commit)
}

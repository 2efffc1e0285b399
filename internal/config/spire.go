package config

import (
	"maps"
	"net"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/hcl/ast"
	"github.com/spf13/pflag"
)

// spireKey is a key of SPIRE's files that rootlink has under another name, or
// has not. Exactly one of the first five fields is set.
type spireKey struct {
	// Flag takes the value as it stands.
	Flag string
	// Host and Port are the flag whose HOST:PORT the value is one part of.
	Host, Port string
	// Means is what values, in lower case, stand for. A value that is not among
	// them is an error: it would ask for something that does not happen.
	Means map[string][]setting
	// Keys are those of a block.
	Keys map[string]spireKey
	// Refuse says why there is nothing like it, and what to do instead.
	Refuse string
}

// setting is a flag and the value that it is given.
type setting struct{ Flag, Value string }

// only accepts values that ask for what rootlink does anyway.
func only(values ...string) spireKey {
	k := spireKey{Means: map[string][]setting{}}
	for _, v := range values {
		k.Means[v] = nil
	}
	return k
}

// logLevels are the names that SPIRE's logger knows beside ours.
func logLevels() spireKey {
	k := spireKey{Means: map[string][]setting{}}
	for name, level := range map[string]string{
		"debug": "debug", "info": "info", "warn": "warn", "error": "error",
		"trace": "debug", "warning": "warn", "fatal": "error", "panic": "error",
	} {
		k.Means[name] = []setting{{"log-level", level}}
	}
	return k
}

func refuse(why string) spireKey { return spireKey{Refuse: why} }

const (
	noLogFile   = "the log goes to stderr: leave it out and let whoever starts the program redirect that"
	noTelemetry = "rootlink has no telemetry sinks; `counters` of rootlink-server prints what is counted"
	noProfiling = "there is no profiling port"
)

// spireKeys are those of SPIRE 1.13's documentation, by section. What is a flag
// of ours by its own name is not listed.
func spireKeys(section string) map[string]spireKey {
	switch section {
	case "server":
		return map[string]spireKey{
			"bind_address":          {Host: "listen"},
			"bind_port":             {Port: "listen"},
			"socket_path":           {Flag: "admin-socket"},
			"default_x509_svid_ttl": {Flag: "svid-ttl"},
			"default_jwt_svid_ttl":  {Flag: "jwt-svid-ttl"},
			"log_level":             logLevels(),
			"log_file":              refuse(noLogFile),
			"log_source_location":   only("false"),
			"ca_key_type":           only("ec-p256"),
			"jwt_key_type":          only("ec-p256"),
			"audit_log_enabled":     refuse("who did what is in the log already"),
			"ca_subject":            refuse("an authority's subject is its trust domain and a serial number, so that no two share one"),
			"jwt_issuer":            refuse("JWT-SVIDs have no issuer claim here; verifiers find the key by kid"),
			"admin_ids":             refuse("an entry makes an administrator: `entry create --admin`, or -admin of spire-server"),
			"federation":            refuse("there is no bundle endpoint: `spire-server bundle set`, or the API call, takes other trust domains' bundles"),
			"experimental":          refuse("SPIRE's experiments are not rootlink's"),
			"profiling_enabled":     only("false"),
			"profiling_port":        refuse(noProfiling),
			"profiling_freq":        refuse(noProfiling),
			"profiling_names":       refuse(noProfiling),
			"prune_tofu_nodes":      only("false"),
			"prune_attested_nodes_expired_for": refuse(
				"expired agents stay listed: `spire-server agent purge` removes them"),
			"max_attested_node_info_staleness": refuse("an agent's record is read at every call"),
			"ratelimit": {Keys: map[string]spireKey{
				"attestation": {Means: map[string][]setting{
					"true": nil, "false": {{"attest-rate", "1000000"}, {"attest-burst", "1000000"}},
				}},
				"signing": only("false"),
			}},
		}
	case "agent":
		return map[string]spireKey{
			"server_address":                  {Host: "server"},
			"server_port":                     {Port: "server"},
			"socket_path":                     {Flag: "socket"},
			"trust_bundle_path":               {Flag: "trust-bundle"},
			"trust_bundle_format":             only("pem"),
			"trust_bundle_url":                refuse("fetch the bundle yourself and name the file with trust_bundle_path, or use join"),
			"trust_bundle_unix_socket":        refuse("name a file with trust_bundle_path, or use join"),
			"insecure_bootstrap":              only("false"),
			"retry_bootstrap":                 only("true"),
			"rebootstrap_mode":                only("never"),
			"rebootstrap_delay":               refuse("a rootlink-agent with a join line finds a new authority by itself"),
			"join_token":                      refuse("a node is its TPM here, and nothing else: see docs/plugin-tpmnode.md"),
			"join_token_file":                 refuse("a node is its TPM here, and nothing else: see docs/plugin-tpmnode.md"),
			"log_level":                       logLevels(),
			"log_file":                        refuse(noLogFile),
			"log_source_location":             only("false"),
			"workload_x509_svid_key_type":     only("ec-p256"),
			"availability_target":             refuse("SVIDs are renewed at half of their life"),
			"x509_svid_cache_max_size":        refuse("an SVID is made when a workload first asks for it"),
			"jwt_svid_cache_max_size":         refuse("the cache is bounded already"),
			"authorized_delegates":            refuse("there is no delegated identity: every caller is measured itself"),
			"admin_socket_path":               refuse("the agent has no admin socket"),
			"sds":                             refuse("the agent does not serve Envoy's SDS"),
			"allow_unauthenticated_verifiers": only("false"),
			"allowed_foreign_jwt_claims":      refuse("ValidateJWTSVID returns the claims of JWT-SVIDs only"),
			"profiling_enabled":               only("false"),
			"profiling_port":                  refuse(noProfiling),
			"profiling_freq":                  refuse(noProfiling),
			"profiling_names":                 refuse(noProfiling),
			"experimental": {Keys: map[string]spireKey{
				"sync_interval":               {Flag: "sync-interval"},
				"use_sync_authorized_entries": only("true"),
				"named_pipe_name":             refuse("rootlink runs on Linux; socket_path names its socket"),
				"admin_named_pipe_name":       refuse("the agent has no admin socket"),
				"require_pq_kem":              only("false"),
				"feature_flags":               refuse("SPIRE's experiments are not rootlink's"),
			}},
		}
	}
	return nil
}

// spireSections are sections of SPIRE's files that rootlink has not.
func spireSections() map[string]string {
	return map[string]string{
		"telemetry": noTelemetry,
	}
}

// reader applies one section of a file to flags.
type reader struct {
	f     *File
	flags *pflag.FlagSet
	// by is which key set a flag, so that listen and bind_port cannot both.
	by map[string]string
	// parts are the host and port of flags whose value is HOST:PORT.
	parts map[string]*[2]string
	ends  map[string]*ast.ObjectItem
}

func (f *File) reader(flags *pflag.FlagSet) *reader {
	return &reader{f: f, flags: flags, by: map[string]string{}, parts: map[string]*[2]string{}, ends: map[string]*ast.ObjectItem{}}
}

// spire applies a key of SPIRE's.
func (r *reader) spire(item *ast.ObjectItem, k spireKey) error {
	name := key(item, 0)
	if k.Refuse != "" {
		return r.f.errorf(item.Pos(), "%s: %s", name, k.Refuse)
	}
	if k.Keys != nil {
		return r.block(item, k.Keys)
	}
	v, err := r.one(item)
	if err != nil {
		return err
	}
	switch {
	case k.Flag != "":
		return r.set(item, k.Flag, v)
	case k.Host != "":
		r.part(item, k.Host)[0] = v
	case k.Port != "":
		r.part(item, k.Port)[1] = v
	default:
		settings, ok := k.Means[strings.ToLower(v)]
		if !ok {
			return r.f.errorf(item.Pos(), "%s = %q is not what rootlink does; leave it out, or set it to %s",
				name, v, strings.Join(slices.Sorted(maps.Keys(k.Means)), ", "))
		}
		for _, s := range settings {
			if err := r.set(item, s.Flag, s.Value); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *reader) part(item *ast.ObjectItem, flag string) *[2]string {
	if r.parts[flag] == nil {
		r.parts[flag] = new([2]string)
	}
	r.ends[flag] = item
	return r.parts[flag]
}

func (r *reader) block(item *ast.ObjectItem, keys map[string]spireKey) error {
	obj, ok := item.Val.(*ast.ObjectType)
	if !ok || len(item.Keys) != 1 {
		return r.f.errorf(item.Pos(), "%s must be a block", key(item, 0))
	}
	seen := map[string]bool{}
	for _, it := range obj.List.Items {
		k, ok := keys[key(it, 0)]
		if !ok {
			return r.f.errorf(it.Pos(), "unknown key %q in %s", key(it, 0), key(item, 0))
		}
		if seen[key(it, 0)] {
			return r.f.errorf(it.Pos(), "%s is set a second time", key(it, 0))
		}
		seen[key(it, 0)] = true
		if err := r.spire(it, k); err != nil {
			return err
		}
	}
	return nil
}

func (r *reader) one(item *ast.ObjectItem) (string, error) {
	if len(item.Keys) != 1 {
		return "", r.f.errorf(item.Pos(), "%s must be a value, not a block", key(item, 0))
	}
	values, err := r.f.values(item)
	if err != nil {
		return "", err
	}
	if len(values) != 1 {
		return "", r.f.errorf(item.Pos(), "%s takes one value", key(item, 0))
	}
	return values[0], nil
}

// finish sets the flags that were given in parts.
func (r *reader) finish() error {
	for _, name := range slices.Sorted(maps.Keys(r.parts)) {
		part, item := r.parts[name], r.ends[name]
		host, port, err := net.SplitHostPort(r.flags.Lookup(name).DefValue)
		if err != nil {
			return err
		}
		if part[0] != "" {
			host = part[0]
		}
		if part[1] != "" {
			port = part[1]
		}
		if err := r.set(item, name, net.JoinHostPort(host, port)); err != nil {
			return err
		}
	}
	return nil
}

// set gives flags their values, unless the command line has set them.
func (r *reader) set(item *ast.ObjectItem, name string, values ...string) error {
	flag := r.flags.Lookup(name)
	if flag == nil {
		return r.f.errorf(item.Pos(), "%s: not known to this program", key(item, 0))
	}
	if other, ok := r.by[name]; ok {
		return r.f.errorf(item.Pos(), "%s and %s both set --%s", other, key(item, 0), name)
	}
	r.by[name] = key(item, 0)
	if flag.Changed {
		return nil
	}
	for _, v := range values {
		if err := r.flags.Set(name, v); err != nil {
			return r.f.errorf(item.Pos(), "%s: %v", key(item, 0), reason(err))
		}
	}
	return nil
}

// SPIREPlugin says what becomes of a block that names a plugin of SPIRE's own:
// skip when rootlink does the same without it, else why there is none, if
// anything better than "not built in" can be said.
func SPIREPlugin(section string, p Plugin) (skip bool, why string) {
	if p.Cmd != "" {
		return false, ""
	}
	switch {
	case section == "agent" && p.Type == "KeyManager" && p.Name == "memory":
		return true, ""
	case section == "agent" && p.Type == "KeyManager":
		return false, "the agent's key stays in memory, so that every boot attests anew; leave the block out"
	case p.Type == "KeyManager":
		return false, "the server keeps its keys in data_dir; leave the block out"
	case p.Type == "DataStore":
		return false, "the server keeps a database of its own in data_dir; leave the block out, docs/migrating-from-spire.md says how entries move"
	case p.Type == "UpstreamAuthority":
		return false, "authorities here are roots, so that a link alone leads to one; leave the block out"
	case p.Type == "NodeAttestor":
		return false, "a node is its TPM here, by NodeAttestor \"tpmnode\"; another attestor needs its program in plugin_cmd"
	}
	return false, ""
}

// SPIREFlags names the flags that SPIRE's keys of a section stand for.
func SPIREFlags(section string) []string {
	var out []string
	var add func(keys map[string]spireKey)
	add = func(keys map[string]spireKey) {
		for _, k := range keys {
			out = append(out, k.Flag, k.Host, k.Port)
			for _, settings := range k.Means {
				for _, s := range settings {
					out = append(out, s.Flag)
				}
			}
			add(k.Keys)
		}
	}
	add(spireKeys(section))
	slices.Sort(out)
	return slices.DeleteFunc(slices.Compact(out), func(s string) bool { return s == "" })
}

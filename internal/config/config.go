// Package config reads the programs' HCL files, in SPIRE's shape:
//
//	server { trust_domain = "example.org" }
//	agent { … }
//	plugins { NodeAttestor "tpmnode" { plugin_data { … } } }
//
// A key of server or agent is a flag of `run` with underscores for hyphens, so
// file and command line cannot drift apart, and every value goes through the
// flag's own checks. SPIRE's own names for the same are taken too; a key of
// SPIRE's that asks for what rootlink does not do is an error that says so. A
// flag on the command line wins over the file.
package config

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/hcl/ast"
	"github.com/hashicorp/hcl/hcl/parser"
	"github.com/hashicorp/hcl/hcl/token"
	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
)

const maxFile = 1 << 20 // bytes

// File is a parsed configuration file.
type File struct {
	path     string
	content  []byte
	sections map[string]*ast.ObjectList // "server", "agent"
	starts   map[string]token.Pos       // of each section
	plugins  []Plugin
}

// Plugin is one block of plugins {}.
type Plugin struct {
	Type     string // "NodeAttestor", "WorkloadAttestor", …
	Name     string
	Cmd      string // plugin_cmd: an external program; empty for a built-in one
	Args     []string
	Checksum string // plugin_checksum: SHA-256 of the program, lower-case hex
	Enabled  bool   // true unless the file says otherwise
	Data     string // plugin_data as HCL, for the plugin's Configure
	DataFile string // plugin_data_file: where Data came from instead, or empty
	Line     int

	data *ast.ObjectList // plugin_data as parsed, nil when absent
}

// SameData reports whether two blocks configure a plugin alike, wherever in the
// file they are.
func (p Plugin) SameData(q Plugin) bool {
	return strings.TrimSpace(p.Data) == strings.TrimSpace(q.Data)
}

// Error names the place in a file that is wrong.
type Error struct {
	Path string
	Line int
	Msg  string
}

func (e *Error) Error() string { return fmt.Sprintf("%s:%d: %s", e.Path, e.Line, e.Msg) }

// Load reads a file. A file that cannot be read is an I/O error; whatever is
// wrong inside it is a usage error that names the line. expand replaces
// variables of the environment in it first, see Expand. Files that plugin blocks
// name with plugin_data_file are read with it, and in the same way.
func Load(path string, expand bool) (*File, error) {
	b, err := read(path, expand, "check the path given with --config")
	if err != nil {
		return nil, err
	}
	f, err := Parse(path, b)
	if err != nil {
		return nil, err
	}
	for i := range f.plugins {
		if p := &f.plugins[i]; p.DataFile != "" && p.Enabled {
			if err := p.readData(expand); err != nil {
				return nil, cli.Hint(err, fmt.Sprintf("%s:%d: plugin_data_file of %s %q names it", path, p.Line, p.Type, p.Name))
			}
		}
	}
	return f, nil
}

func read(path string, expand bool, hint string) ([]byte, error) {
	b, err := files.Read(path, maxFile)
	if err != nil {
		return nil, cli.Fail(cli.ExitInternal, err, hint)
	}
	// It names programs that run as our user (plugin_cmd), and whom to trust.
	if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o002 != 0 {
		return nil, cli.Fail(cli.ExitInternal, fmt.Errorf("%s is writable for every user", path), "chmod o-w "+path)
	}
	if expand {
		return Expand(path, b, os.LookupEnv)
	}
	return b, nil
}

// readData takes plugin_data from the file of its own that the block names.
func (p *Plugin) readData(expand bool) error {
	b, err := read(p.DataFile, expand, "")
	if err != nil {
		return err
	}
	if p.data, err = parse(p.DataFile, b); err != nil {
		return err
	}
	p.Data = string(b)
	return nil
}

// parse reads HCL; path is for messages only.
func parse(path string, content []byte) (list *ast.ObjectList, err error) {
	defer func() {
		// The scanner panics on a few malformed strings instead of failing.
		if r := recover(); r != nil {
			list, err = nil, usage(&Error{path, 1, fmt.Sprintf("not readable as HCL: %v", r)})
		}
	}()
	// Duplicates are refused by callers, where their line is known.
	tree, err := parser.ParseDontErrorOnDuplicateKeys(content)
	if err != nil {
		if pe, ok := errors.AsType[*parser.PosError](err); ok {
			return nil, usage(&Error{path, pe.Pos.Line, pe.Err.Error()})
		}
		return nil, usage(&Error{path, 1, err.Error()})
	}
	return tree.Node.(*ast.ObjectList), nil
}

// Parse reads the content of a file; path is for messages only. It opens no
// file that the content names, see Load.
func Parse(path string, content []byte) (*File, error) {
	list, err := parse(path, content)
	if err != nil {
		return nil, err
	}
	f := &File{path: path, content: content, sections: map[string]*ast.ObjectList{}, starts: map[string]token.Pos{}}
	seen := map[string]bool{}
	for _, item := range list.Items {
		name := key(item, 0)
		obj, isBlock := item.Val.(*ast.ObjectType)
		why, spires := spireSections()[name]
		switch {
		case spires:
			return nil, f.errorf(item.Pos(), "%s: %s", name, why)
		case name != "server" && name != "agent" && name != "plugins" && name != healthSection:
			return nil, f.errorf(item.Pos(), "unknown section %q; the sections are server, agent, plugins and health_checks", name)
		case !isBlock || len(item.Keys) != 1:
			return nil, f.errorf(item.Pos(), "%s must be a block: %s { … }", name, name)
		case seen[name]:
			return nil, f.errorf(item.Pos(), "a second %s section", name)
		case name == "plugins":
			if err := f.readPlugins(obj.List); err != nil {
				return nil, err
			}
		default:
			f.sections[name], f.starts[name] = obj.List, item.Pos()
		}
		seen[name] = true
	}
	return f, nil
}

// Apply sets the flags that the section names and the command line does not.
// A key without a flag of that name is an error that names its line. So is a
// file that configures another program: nothing in it would be used, in silence.
func (f *File) Apply(section string, flags *pflag.FlagSet) error {
	if err := f.health(flags); err != nil {
		return err
	}
	if list := f.sections[section]; list != nil {
		r := f.reader(flags)
		if err := r.apply(section, list, spireKeys(section), nil); err != nil {
			return err
		}
		return r.finish()
	}
	for other := range f.sections {
		if other == healthSection {
			continue
		}
		return f.errorf(f.starts[other], "a %s section and none for the %s, which reads this", other, section)
	}
	return nil
}

// ApplyPlugins sets the flags that plugin_data of built-in plugins names:
// builtin maps TYPE "NAME" (written with a space) to the keys that are flags as
// well. External plugins are the caller's; any other plugin is an error:
// skipping it would leave out a check that somebody believes in.
func (f *File) ApplyPlugins(flags *pflag.FlagSet, builtin map[string][]string) error {
	for _, p := range f.plugins {
		keys, ok := builtin[p.Type+" "+p.Name]
		pos := token.Pos{Line: p.Line}
		skip, why := false, ""
		if !ok {
			skip, why = SPIREPlugin("server", p)
		}
		switch {
		case !p.Enabled || skip:
		case why != "":
			return f.errorf(pos, "%s %q: %s", p.Type, p.Name, why)
		case p.Cmd != "":
		case p.Checksum != "" || len(p.Args) != 0:
			return f.errorf(pos, "%s %q: plugin_checksum and plugin_args without a plugin_cmd", p.Type, p.Name)
		case !ok:
			return f.errorf(pos, "%s %q is not built into this program, and no plugin_cmd names one", p.Type, p.Name)
		case p.data != nil:
			in := f // where the lines are
			if p.DataFile != "" {
				in = &File{path: p.DataFile}
			}
			if err := in.reader(flags).apply(fmt.Sprintf("plugin_data of %q", p.Name), p.data, nil, keys); err != nil {
				return err
			}
		}
	}
	return nil
}

// apply sets flags from a block; spire are keys by other names, only, if not
// nil, lists the keys allowed.
func (r *reader) apply(block string, list *ast.ObjectList, spire map[string]spireKey, only []string) error {
	seen := map[string]bool{}
	for _, item := range list.Items {
		name := key(item, 0)
		if seen[name] {
			return r.f.errorf(item.Pos(), "%s is set a second time", name)
		}
		seen[name] = true
		if k, ok := spire[name]; ok {
			if err := r.spire(item, k); err != nil {
				return err
			}
			continue
		}
		flag := r.flags.Lookup(strings.ReplaceAll(name, "_", "-"))
		if flag == nil || strings.Contains(name, "-") || notKeys[flag.Name] || only != nil && !slices.Contains(only, name) {
			return r.f.errorf(item.Pos(), "unknown key %q in %s", name, block)
		}
		if len(item.Keys) != 1 {
			return r.f.errorf(item.Pos(), "%s must be a value, not a block", name)
		}
		values, err := r.f.values(item)
		if err != nil {
			return err
		}
		if _, list := flag.Value.(pflag.SliceValue); !list && len(values) != 1 {
			return r.f.errorf(item.Pos(), "%s takes one value", name)
		}
		if err := r.set(item, flag.Name, values...); err != nil {
			return err
		}
	}
	return nil
}

// reason is a flag's refusal without pflag's words about the command line.
func reason(err error) error {
	if inner := errors.Unwrap(err); inner != nil {
		return inner
	}
	return err
}

// notKeys are flags that mean nothing in a file.
var notKeys = map[string]bool{"config": true, "expand-env": true, "help": true, "output": true, "version": true}

// Plugins returns the blocks of plugins {} in the file's order.
func (f *File) Plugins() []Plugin { return f.plugins }

func (f *File) readPlugins(list *ast.ObjectList) error {
	seen := map[string]bool{}
	for _, item := range list.Items {
		obj, ok := item.Val.(*ast.ObjectType)
		if !ok || len(item.Keys) != 2 {
			return f.errorf(item.Pos(), `a plugin is written as TYPE "NAME" { … }`)
		}
		p := Plugin{Type: key(item, 0), Name: key(item, 1), Enabled: true, Line: item.Pos().Line}
		if id := p.Type + " " + p.Name; seen[id] {
			return f.errorf(item.Pos(), "a second %s %q", p.Type, p.Name)
		} else {
			seen[id] = true
		}
		for _, it := range obj.List.Items {
			if err := f.readPluginKey(&p, it); err != nil {
				return err
			}
		}
		if p.data != nil && p.DataFile != "" {
			return f.errorf(item.Pos(), "%s %q: plugin_data and plugin_data_file; one of them says what the plugin is configured with", p.Type, p.Name)
		}
		f.plugins = append(f.plugins, p)
	}
	return nil
}

func (f *File) readPluginKey(p *Plugin, item *ast.ObjectItem) error {
	name := key(item, 0)
	if name == "plugin_data" {
		obj, ok := item.Val.(*ast.ObjectType)
		if !ok || len(item.Keys) != 1 {
			return f.errorf(item.Pos(), "plugin_data must be a block")
		}
		// The text as it stands, below as many empty lines as there are above it in
		// the file: whatever line the plugin names is the file's.
		start, end := obj.Lbrace.Offset+1, obj.Rbrace.Offset
		if start > end || end > len(f.content) {
			return f.errorf(item.Pos(), "plugin_data cannot be read")
		}
		p.Data, p.data = strings.Repeat("\n", obj.Lbrace.Line-1)+string(f.content[start:end]), obj.List
		return nil
	}
	if len(item.Keys) != 1 {
		return f.errorf(item.Pos(), "%s must be a value, not a block", name)
	}
	values, err := f.values(item)
	if err != nil {
		return err
	}
	if name == "plugin_args" {
		p.Args = values
		return nil
	}
	if len(values) != 1 {
		return f.errorf(item.Pos(), "%s takes one value", name)
	}
	switch v := values[0]; name {
	case "plugin_data_file":
		if v == "" {
			return f.errorf(item.Pos(), "plugin_data_file is empty; leave it out, or name a file")
		}
		p.DataFile = v
	case "plugin_cmd":
		p.Cmd = v
	case "plugin_checksum":
		p.Checksum = strings.ToLower(v)
	case "enabled":
		if v != "true" && v != "false" {
			return f.errorf(item.Pos(), "enabled must be true or false")
		}
		p.Enabled = v == "true"
	default:
		return f.errorf(item.Pos(), "unknown key %q in %s %q", name, p.Type, p.Name)
	}
	return nil
}

// values returns a literal, or a list of literals, as a flag would be given it.
func (f *File) values(item *ast.ObjectItem) ([]string, error) {
	nodes := []ast.Node{item.Val}
	if l, ok := item.Val.(*ast.ListType); ok {
		nodes = l.List
	}
	out := make([]string, 0, len(nodes))
	for _, n := range nodes {
		lit, ok := n.(*ast.LiteralType)
		if !ok {
			return nil, f.errorf(item.Pos(), "%s must be a value or a list of values", key(item, 0))
		}
		if lit.Token.Type == token.STRING || lit.Token.Type == token.HEREDOC {
			out = append(out, lit.Token.Value().(string))
		} else {
			out = append(out, lit.Token.Text)
		}
	}
	return out, nil
}

func key(item *ast.ObjectItem, i int) string {
	if i >= len(item.Keys) {
		return ""
	}
	s, _ := item.Keys[i].Token.Value().(string)
	return s
}

func (f *File) errorf(pos token.Pos, format string, args ...any) error {
	return usage(&Error{f.path, pos.Line, fmt.Sprintf(format, args...)})
}

func usage(e *Error) error {
	return cli.Fail(cli.ExitUsage, e, hintFor(e.Msg))
}

// hintFor says what a mistake calls for: only a key of the daemon's own section
// is a flag of its.
func hintFor(msg string) string {
	switch {
	case strings.Contains(msg, "plugin_data of"):
		return "docs/plugin-tpmnode.md and docs/plugin-binary.md have each plugin's keys"
	case strings.Contains(msg, "unknown key"):
		return "the keys are the flags of `run`, with underscores for hyphens; see --help"
	default:
		return "mend that line and judge the file again with `validate`; docs/migrating-from-spire.md has whole files"
	}
}

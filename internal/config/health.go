package config

import (
	"net"

	"github.com/hashicorp/hcl/hcl/ast"
	"github.com/spf13/pflag"
)

// healthSection is the block for health probes over HTTP, of either program.
const healthSection = "health_checks"

// health sets the flags that health_checks stands for. As in SPIRE's files the
// block has its say only with listener_enabled, but a key that does not exist is
// an error in any case.
func (f *File) health(flags *pflag.FlagSet) error {
	list := f.sections[healthSection]
	if list == nil {
		return nil
	}
	r := f.reader(flags)
	host, port, enabled := "localhost", "80", "false"
	paths := map[string]*ast.ObjectItem{}
	seen := map[string]bool{}
	var last *ast.ObjectItem
	for _, item := range list.Items {
		name := key(item, 0)
		if seen[name] {
			return f.errorf(item.Pos(), "%s is set a second time", name)
		}
		seen[name] = true
		v, err := r.one(item)
		if err != nil {
			return err
		}
		switch name {
		case "listener_enabled":
			if v != "true" && v != "false" {
				return f.errorf(item.Pos(), "listener_enabled must be true or false")
			}
			enabled, last = v, item
		case "bind_address":
			host = v
		case "bind_port":
			port = v
		case "live_path", "ready_path":
			paths[name] = item
		default:
			return f.errorf(item.Pos(), "unknown key %q in %s", name, healthSection)
		}
	}
	if enabled != "true" {
		return nil
	}
	if err := r.set(last, "health-listen", net.JoinHostPort(host, port)); err != nil {
		return err
	}
	for name, flag := range map[string]string{"live_path": "health-live-path", "ready_path": "health-ready-path"} {
		if item := paths[name]; item != nil {
			v, err := r.one(item)
			if err != nil {
				return err
			}
			if err := r.set(item, flag, v); err != nil {
				return err
			}
		}
	}
	return nil
}

package binary

import (
	"errors"
	"fmt"

	"github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/token"

	"github.com/rootlink/rootlink/internal/hclkeys"
	"github.com/rootlink/rootlink/internal/workload"
)

// config is plugin_data. The tag of Unknown collects what no field took.
type config struct {
	HashBytesPerUID  int64    `hcl:"hash_bytes_per_uid"`
	AllowFileSystems []string `hcl:"allow_file_systems"`
	AllUsers         bool     `hcl:"all_users"`

	Unknown map[string][]token.Pos `hcl:",unusedKeyPositions"`
}

// parseConfig reads plugin_data. A key that nobody reads is an error: a typing
// error in a security setting would otherwise pass for the setting.
func parseConfig(text string) (workload.Options, error) {
	var c config
	if err := hcl.Decode(&c, text); err != nil {
		return workload.Options{}, fmt.Errorf("configuration cannot be read: %w", err)
	}
	if err := hclkeys.Unknown(c.Unknown); err != nil {
		return workload.Options{}, err
	}
	if c.HashBytesPerUID < 0 {
		return workload.Options{}, errors.New("hash_bytes_per_uid is negative")
	}
	return workload.Options{
		BytesPerUID:      c.HashBytesPerUID,
		AllowFileSystems: c.AllowFileSystems,
		AllUsers:         c.AllUsers,
	}, nil
}

package layout

// Limits on hostile input, checked before anything is allocated for it.
const (
	MaxFile        = 4 << 20 // bytes of a layout file
	MaxClassic     = 32 << 20
	MaxSteps       = 256
	MaxInspections = 64
	MaxRules       = 1024 // of one step, on one side
	MaxRuleWords   = 10   // the longest form of MATCH
	MaxPattern     = 4096 // bytes of a pattern, a prefix or a name in a rule
	MaxKeys        = 64   // functionary keys of a layout
	MaxSignatures  = 8    // of a layout
	MaxThreshold   = 64
	MaxDemands     = 4096 // entries of one list of hashes or patterns
	MaxReadme      = 64 << 10
	MaxCommand     = 1024 // words of an expected command, or of an inspection's
	MaxWord        = 4096 // bytes of one
	MaxDepth       = 4    // sublayouts inside each other
	MaxSublayouts  = 32
	MaxLinks       = 256 // bundles and classic links in one verification
	MaxName        = 128 // bytes of a layout's, a step's or an inspection's name
	MaxLife        = 10  // years from issue to expiry
)

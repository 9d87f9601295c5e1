package release

import "fmt"

// Bounds of secrets, and of env_vars: what an environment may hold. Lengths are
// in bytes.
const (
	MaxVars      = 1000
	MaxVarName   = 256
	MaxVarValue  = 64 << 10
	MaxVarsTotal = 512 << 10 // of all names and values
)

// checkName says why name cannot be an environment variable's, or "".
func checkName(name string) string {
	if len(name) > MaxVarName {
		return fmt.Sprintf("the name is longer than %d bytes", MaxVarName)
	}
	if !envName.MatchString(name) {
		return "a name is made of letters, digits and '_' and does not begin with a digit"
	}
	return ""
}

// checkSize says why vars are too many or too large, or "". It is the same for
// any order.
func checkSize(vars map[string]string) string {
	if len(vars) > MaxVars {
		return fmt.Sprintf("%d variables are more than %d", len(vars), MaxVars)
	}
	total, large := 0, ""
	for name, value := range vars {
		total += len(name) + len(value)
		if len(value) > MaxVarValue && (large == "" || name < large) {
			large = name
		}
	}
	if large != "" {
		return fmt.Sprintf("the value of %s is longer than %d bytes", large, MaxVarValue)
	}
	if total > MaxVarsTotal {
		return fmt.Sprintf("names and values are %d bytes together, more than %d", total, MaxVarsTotal)
	}
	return ""
}

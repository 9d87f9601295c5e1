package management

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"tako/internal/tako"
)

// The statuses of a line that the server sends. Progress and line come before
// the last one, which is ok or error.
const (
	statusOK       = "ok"
	statusError    = "error"
	statusProgress = "progress"
	statusLine     = "line"
)

// internalText is all that a caller hears of an error that is not for it.
const internalText = "Internal error; the server's log has the details."

type okLine struct {
	Status string `json:"status"`
	Data   any    `json:"data"`
}

type textLine struct {
	Status  string    `json:"status"`
	Message string    `json:"message"`
	Code    tako.Code `json:"code,omitempty"`
}

// Hello is the reply to hello.
type Hello struct {
	ProtocolVersion int      `json:"protocol_version"`
	ServerVersion   string   `json:"server_version"`
	Capabilities    []string `json:"capabilities"`
}

type (
	lockReply struct {
		Status tako.Mode `json:"status"`
		Owner  string    `json:"owner"`
	}
	appReply struct {
		Status string     `json:"status"`
		App    tako.AppID `json:"app"`
	}
	deleteReply struct {
		appReply
		Existed bool `json:"existed"`
	}
	scaleReply struct {
		appReply
		Instances uint8 `json:"instances"`
	}
	secretsReply struct {
		appReply
		Restarted bool `json:"restarted"`
	}
	listReply struct {
		Apps []AppSummary `json:"apps"`
	}
	releasesReply struct {
		App      tako.AppID `json:"app"`
		Releases []Release  `json:"releases"`
	}
	routesReply struct {
		Routes []AppRoutes `json:"routes"`
	}
)

// deployShape has the fields of all four shapes of a DeployResult.
type deployShape struct {
	Status           string         `json:"status"`
	App              tako.AppID     `json:"app"`
	Version          tako.ReleaseID `json:"version"`
	NewApp           *bool          `json:"new_app,omitempty"`
	NewInstances     *int           `json:"new_instances,omitempty"`
	OldInstances     *int           `json:"old_instances,omitempty"`
	RolledBack       *bool          `json:"rolled_back,omitempty"`
	OnDemand         *bool          `json:"on_demand,omitempty"`
	StartupValidated *bool          `json:"startup_validated,omitempty"`
	WarmInstance     *bool          `json:"warm_instance,omitempty"`
}

// MarshalJSON gives one of four shapes: a first start has new_app and on_demand,
// a rolling update new_instances, old_instances and rolled_back; either has
// on_demand, startup_validated and warm_instance, all true, for an app on demand.
func (d DeployResult) MarshalJSON() ([]byte, error) {
	s := deployShape{Status: "deployed", App: d.App, Version: d.Version}
	if d.Rolled {
		s.NewInstances, s.OldInstances, s.RolledBack = &d.NewInstances, &d.OldInstances, new(false)
	} else {
		s.NewApp, s.OnDemand = &d.NewApp, new(false)
	}
	if d.OnDemand {
		s.OnDemand, s.StartupValidated, s.WarmInstance = new(true), new(true), new(true)
	}
	return json.Marshal(s)
}

// UnmarshalJSON reads any of the four shapes.
func (d *DeployResult) UnmarshalJSON(b []byte) error {
	var s deployShape
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("deploy result: %w", err)
	}
	*d = DeployResult{
		App: s.App, Version: s.Version, Rolled: s.NewInstances != nil, NewApp: value(s.NewApp),
		NewInstances: value(s.NewInstances), OldInstances: value(s.OldInstances), OnDemand: value(s.OnDemand),
	}
	return nil
}

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// Error is the JSON text.
func (e *RollbackError) Error() string {
	b, err := plainJSON(struct {
		App        tako.AppID `json:"app"`
		Error      string     `json:"error"`
		LastLines  []string   `json:"last_lines,omitempty"`
		RolledBack bool       `json:"rolled_back"`
		Status     string     `json:"status"`
	}{e.App, e.Cause, e.LastLines, true, "rollback"})
	if err != nil {
		return e.Cause
	}
	return string(b)
}

// errorLine turns an error into what its caller may know: an Error's own words,
// and of any other only that there is one. The second result says that the log
// has to have the rest.
func errorLine(err error) (textLine, bool) {
	if e, ok := errors.AsType[*RollbackError](err); ok {
		return textLine{statusError, e.Error(), tako.CodeFailed}, false
	}
	if e, ok := errors.AsType[*tako.Error](err); ok {
		return textLine{statusError, e.Message, e.Code}, e.Code == tako.CodeInternal
	}
	return textLine{statusError, internalText, tako.CodeInternal}, true
}

// plainJSON is JSON without the escapes that only HTML needs.
func plainJSON(v any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n")), nil
}

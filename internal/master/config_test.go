package master_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tako/internal/master"
)

func parse(t *testing.T, settings string, args ...string) (master.Config, error) {
	t.Helper()
	var c master.Config
	f := master.NewFlags(&c)
	if err := f.Parse(args); err != nil {
		t.Fatal(err)
	}
	return c, master.ApplySettings(f, "server-config.toml", settings)
}

func TestDefaultsAreTheContracts(t *testing.T) {
	c, err := parse(t, "")
	if err != nil {
		t.Fatal(err)
	}
	if c.Socket != "/var/run/tako/tako.sock" || c.Port != 80 || c.TLSPort != 443 || c.DataDir != "/opt/tako" ||
		c.NoACME || c.ACMEStaging || c.ACMEEmail != "" || c.RenewalHours != 12 || c.InstancePortOffset != 0 {
		t.Errorf("defaults are %+v", c)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("the defaults are refused: %v", err)
	}
}

func TestFlagsWinOverSettings(t *testing.T) {
	c, err := parse(t, `
port = 8080
tls-port = 8443
no-acme = true
log-level = "debug"
trusted-proxies = ["10.0.0.0/8", "192.0.2.1"]
`, "--port=9090")
	if err != nil {
		t.Fatal(err)
	}
	if c.Port != 9090 || c.TLSPort != 8443 || !c.NoACME || c.LogLevel != "debug" || len(c.TrustedProxies) != 2 {
		t.Errorf("got %+v", c)
	}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
}

func TestBadSettingsNameEachFault(t *testing.T) {
	for text, want := range map[string]string{
		"port = 70000":            "port:",
		"port = \"http\"":         "port:",
		"prot = 80":               "prot: there is no such setting",
		"data-dir = \"/srv\"":     "data-dir: this can only be a flag",
		"port = [80]":             "port: want one value",
		"trusted-proxies = [1]":   "trusted-proxies: want a list of strings",
		"no-acme = 3.5":           "no-acme: want a string, number, boolean",
		"port = ":                 "settings server-config.toml",
		"[server]\nhttp_port = 1": "server: there is no such setting",
	} {
		if _, err := parse(t, text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one with %q", text, err, want)
		}
	}
	_, err := parse(t, "a = 1\nb = 2\n")
	if err == nil || !strings.Contains(err.Error(), "a: ") || !strings.Contains(err.Error(), "b: ") {
		t.Errorf("error %v does not name both faults", err)
	}
}

func TestValidateReportsEveryFault(t *testing.T) {
	c, err := parse(t, "", "--port=80", "--tls-port=80", "--instance-ports=1-2", "--app-uids=x", "--listen-address=localhost",
		"--trusted-proxies=everyone", "--renewal-interval-hours=0", "--log-level=loud", "--log-format=xml", "--http-engine=apache",
		"--socket=/tmp/"+strings.Repeat("s", 120))
	if err != nil {
		t.Fatal(err)
	}
	err = c.Validate()
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{
		"--port and --tls-port", "--instance-ports", "--app-uids", "--listen-address", "--trusted-proxies",
		"--renewal-interval-hours", "--log-level", "--log-format", "--http-engine", "at most 107",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not speak of %q:\n%v", want, err)
		}
	}
}

func TestProxyProtocolNeedsSomebodyToTrust(t *testing.T) {
	for args, good := range map[string]bool{"--proxy-protocol": false, "--proxy-protocol --trusted-proxies=10.0.0.0/8": true} {
		c, err := parse(t, "", strings.Fields(args)...)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Validate(); good == (err != nil && strings.Contains(err.Error(), "--proxy-protocol: nobody may connect")) {
			t.Errorf("%s: %v", args, err)
		}
	}
}

func TestSettingsFileThatWasAskedForMustExist(t *testing.T) {
	dir := t.TempDir()
	c := master.Config{}
	f := master.NewFlags(&c)
	if err := f.Parse([]string{"--data-dir", dir}); err != nil {
		t.Fatal(err)
	}
	if err := master.LoadSettings(f, &c); err != nil {
		t.Errorf("without a file: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "server-config.toml"), []byte("port = 8081"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := master.LoadSettings(f, &c); err != nil || c.Port != 8081 {
		t.Errorf("port %d (%v), want 8081 from the file in the data root", c.Port, err)
	}
	c.SettingsFile = filepath.Join(dir, "missing.toml")
	if err := master.LoadSettings(f, &c); err == nil {
		t.Error("a missing --config was accepted")
	}
}

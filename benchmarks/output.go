package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
)

// An outcome is all that was measured, and where.
type outcome struct {
	Machine   machine             `json:"machine"`
	Scenarios []*measuredScenario `json:"scenarios"`
}

type machine struct {
	OS    string            `json:"os"`
	Arch  string            `json:"arch"`
	CPU   string            `json:"cpu"`
	CPUs  int               `json:"cpus"`
	Go    string            `json:"go"`
	Other map[string]string `json:"modules"` // versions of what is measured beside taskexec
}

func thisMachine() machine {
	m := machine{OS: runtime.GOOS, Arch: runtime.GOARCH, CPU: cpuModel(), CPUs: runtime.NumCPU(), Go: runtime.Version(), Other: make(map[string]string)}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			switch d.Path {
			case "google.golang.org/grpc", "github.com/nats-io/nats.go", "github.com/nats-io/nats-server/v2":
				m.Other[d.Path] = d.Version
			}
		}
	}
	return m
}

// cpuModel is the processor's name, as far as Linux says it.
func cpuModel() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	for line := range bytes.Lines(info) {
		if key, value, ok := strings.Cut(string(line), ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

func (m machine) String() string {
	return fmt.Sprintf("%d cores, %s, %s/%s, %s", m.CPUs, m.CPU, m.OS, m.Arch, m.Go)
}

func (o outcome) writeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(o)
}

func (o outcome) writeTables(dst io.Writer) error {
	w := bufio.NewWriter(dst)
	fmt.Fprintf(w, "Measured on %s.\n", o.Machine)
	for _, s := range o.Scenarios {
		s.writeTable(w)
	}
	o.writeFigures(w)
	return w.Flush()
}

func (s *measuredScenario) writeTable(w io.Writer) {
	rounds := len(s.Rows[0].Values)
	fmt.Fprintf(w, "\n%s. %s\n\n", s.Title, counted(rounds))
	fmt.Fprintf(w, "| | %s | min–max |", s.unit.name)
	columns := "|---|---:|---:|"
	if s.Baseline != "" {
		fmt.Fprintf(w, " ÷ %s | min–max |", s.Baseline)
		columns += "---:|---:|"
	}
	fmt.Fprintf(w, "\n%s\n", columns)
	for _, r := range s.Rows {
		fmt.Fprintf(w, "| %s | %s | %s |", r.Name, s.unit.format(r.Median), r.spread(s.unit))
		switch {
		case r.Ratio != nil:
			fmt.Fprintf(w, " %s | %s |", ratioUnit.format(r.Ratio.Median), r.Ratio.spread(ratioUnit))
		case s.Baseline != "":
			fmt.Fprint(w, " | |")
		}
		fmt.Fprintln(w)
	}
}

func counted(rounds int) string {
	if rounds == 1 {
		return "One round."
	}
	return fmt.Sprintf("Medians of %d rounds.", rounds)
}

// writeFigures writes what the project aims at beside what was measured.
func (o outcome) writeFigures(w io.Writer) {
	heading := "\nAims. A ratio is the median of the rounds' ratios.\n\n| figure | measured | min–max | aim |\n|---|---:|---:|---:|\n"
	for _, s := range o.Scenarios {
		for _, f := range s.Figures {
			fmt.Fprint(w, heading)
			heading = ""
			text := f.Text
			if f.Unit != "" {
				text += ", " + f.Unit
			}
			fmt.Fprintf(w, "| %s | %s | %s | %s |\n", text, f.unit.format(f.Median), f.spread(f.unit), f.Aim)
		}
	}
}

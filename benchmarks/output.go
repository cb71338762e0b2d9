package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
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
	text := fmt.Sprintf("%d cores, %s, %s/%s, %s", m.CPUs, m.CPU, m.OS, m.Arch, m.Go)
	for _, path := range slices.Sorted(maps.Keys(m.Other)) {
		text += ", " + path + " " + m.Other[path]
	}
	return text
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
	fmt.Fprintf(w, "\n%s. %s\n\n", s.Title, counted(len(s.Rows[0].Values)))
	computed := slices.ContainsFunc(s.Rows, func(r *row) bool { return r.CPU != nil })
	heads := []string{"", s.unit.table}
	if s.Baseline != "" {
		heads = append(heads, "÷ "+s.Baseline)
	}
	switch {
	case computed && s.apart:
		heads = append(heads, "CPU ns a task, coordinator", "workers")
	case computed:
		heads = append(heads, "CPU ns a task")
	}
	writeLine(w, heads)
	fmt.Fprintf(w, "|---%s|\n", strings.Repeat("|---:", len(heads)-1))
	for _, r := range s.Rows {
		cells := []string{r.Name, r.in(s.unit)}
		if s.Baseline != "" {
			ratio := ""
			if r.Ratio != nil {
				ratio = r.Ratio.in(noUnit)
			}
			cells = append(cells, ratio)
		}
		switch {
		case r.Coordinator != nil:
			cells = append(cells, nanoseconds.format(r.Coordinator.Median), nanoseconds.format(r.Workers.Median))
		case r.CPU != nil:
			cells = append(cells, nanoseconds.format(r.CPU.Median))
		}
		writeLine(w, cells)
	}
}

func writeLine(w io.Writer, cells []string) {
	fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
}

func counted(rounds int) string {
	if rounds == 1 {
		return "One round."
	}
	return fmt.Sprintf("Medians of %d rounds (lowest–highest).", rounds)
}

// writeFigures writes what the project aims at beside what was measured.
func (o outcome) writeFigures(w io.Writer) {
	started := false
	for _, s := range o.Scenarios {
		for _, f := range s.Figures {
			if !started {
				fmt.Fprint(w, "\nWhat is aimed at. Ratios are taken round by round.\n\n")
				writeLine(w, []string{"figure", "measured", "aim"})
				fmt.Fprint(w, "|---|---:|---:|\n")
				started = true
			}
			text := f.Text
			if f.unit != noUnit {
				text += ", " + f.unit.table
			}
			writeLine(w, []string{text, f.in(f.unit), f.Aim})
		}
	}
}

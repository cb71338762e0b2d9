package main

import (
	"fmt"
	"os"
	"regexp"
	"runtime"
	"slices"
	"time"
)

// A scenario is contestants that are measured side by side: round by round,
// each once a round. So what the machine does meanwhile meets all of them, and
// a ratio is taken within a round.
type scenario struct {
	name        string // the first part of the names of its rows
	title       string
	note        string // why it has no contestants
	unit        unit
	rounds      int
	baseline    string // the contestant that ratios are of
	apart       bool   // CPU is told of this process, the coordinator's, and of the others apart
	contestants []contestant
	figures     []figure
}

// A contestant is one row of a scenario.
type contestant struct {
	name string
	// measure is called once to warm up, unless the scenario has one round
	// only, and then once a round.
	measure func() (measurement, error)
}

type measurement struct {
	value float64
	cpu   float64 // seconds a task that all processes together have computed; 0 if it is not known or not asked for
	own   float64 // of them, this process's
}

// A figure is what the project aims at: the ratio of two contestants, or what
// one of them measures.
type figure struct {
	text    string
	of, per string // contestants; per may be ""
	aim     string
}

// A unit is what values are in, and how a table writes them.
type unit struct {
	base  string  // of the values, and of JSON
	table string  // of what a table says
	size  float64 // of the table's, in the base's
	form  string  // for fmt.Sprintf
}

func (u unit) format(value float64) string { return fmt.Sprintf(u.form, value/u.size) }

var (
	tasksPerSecond = unit{"tasks/s", "1000 tasks/s", 1e3, "%.0f"}
	bytesPerSecond = unit{"bytes/s each way", "MB/s each way", 1e6, "%.0f"}
	microseconds   = unit{"s a task", "µs a task", 1e-6, "%.1f"}
	nanoseconds    = unit{"s a task", "ns a task", 1e-9, "%.0f"}
	mebibytes      = unit{"bytes", "MiB", 1 << 20, "%.1f"}
	bytesPerTask   = unit{"bytes a task", "bytes a task", 1, "%.0f"}
	allocations    = unit{"allocations a task", "allocations a task", 1, "%.3f"}
	noUnit         = unit{"", "", 1, "%.3g"}
)

// timed takes the seconds that f needs for each of its n tasks.
func (ps processes) timed(n int, f func() error) (measurement, error) {
	_, before, err := ps.usage()
	if err != nil {
		return measurement{}, err
	}
	own, start := cpuTime(), time.Now()
	if err := f(); err != nil {
		return measurement{}, err
	}
	elapsed := time.Since(start)
	own = cpuTime() - own
	_, after, err := ps.usage()
	perTask := 1 / float64(n)
	return measurement{
		value: elapsed.Seconds() * perTask,
		cpu:   (own + after.CPU - before.CPU).Seconds() * perTask,
		own:   own.Seconds() * perTask,
	}, err
}

// A row is what has been measured of a contestant, round by round.
type row struct {
	Name   string    `json:"name"`
	Values []float64 `json:"values"`
	Ratios []float64 `json:"ratios,omitempty"` // to the baseline of the same round
	summary
	Ratio       *summary  `json:"ratio,omitempty"`
	CPU         *summary  `json:"cpu,omitempty"`             // seconds a task, of all processes together
	Coordinator *summary  `json:"cpu_coordinator,omitempty"` // of them
	Workers     *summary  `json:"cpu_workers,omitempty"`     // the rest
	cpu         []float64 // round by round
	own         []float64
}

// A summary is of the rounds.
type summary struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func summarize(values []float64) summary {
	sorted := slices.Sorted(slices.Values(values))
	middle := sorted[len(sorted)/2]
	if len(sorted)%2 == 0 {
		middle = (middle + sorted[len(sorted)/2-1]) / 2
	}
	return summary{middle, sorted[0], sorted[len(sorted)-1]}
}

// A measuredScenario is the outcome of a scenario.
type measuredScenario struct {
	Name     string           `json:"name"`
	Title    string           `json:"title"`
	Unit     string           `json:"unit"`
	Baseline string           `json:"baseline,omitempty"`
	Rows     []*row           `json:"rows"`
	Figures  []measuredFigure `json:"figures,omitempty"`
	unit     unit
	apart    bool
}

type measuredFigure struct {
	Text string `json:"text"`
	Aim  string `json:"aim"`
	Unit string `json:"unit,omitempty"` // "" for a ratio
	summary
	unit unit
}

// measure runs those of the scenario's contestants that only selects.
func (s scenario) measure(only *regexp.Regexp) (*measuredScenario, error) {
	if s.note != "" {
		fmt.Fprintf(os.Stderr, "%s: %s\n", s.name, s.note)
	}
	chosen := slices.DeleteFunc(slices.Clone(s.contestants), func(c contestant) bool {
		return !only.MatchString(s.name + "/" + c.name)
	})
	m := &measuredScenario{Name: s.name, Title: s.title, Unit: s.unit.base, Baseline: s.baseline, unit: s.unit, apart: s.apart}
	if len(chosen) == 0 {
		return m, nil
	}
	fmt.Fprintf(os.Stderr, "%s …\n", s.name)
	rows := make(map[string]*row)
	for _, c := range chosen {
		rows[c.name] = &row{Name: c.name}
		m.Rows = append(m.Rows, rows[c.name])
	}
	first := 0
	if s.rounds > 1 {
		first = -1 // to warm up
	}
	for round := first; round < s.rounds; round++ {
		// Each is the first in its turn, so that none always has the machine
		// as another has left it.
		for i := range chosen {
			c := chosen[(i+max(round, 0))%len(chosen)]
			runtime.GC()
			measured, err := c.measure()
			if err != nil {
				return nil, fmt.Errorf("%s/%s: %w", s.name, c.name, err)
			}
			if round >= 0 {
				r := rows[c.name]
				r.Values = append(r.Values, measured.value)
				r.cpu = append(r.cpu, measured.cpu)
				r.own = append(r.own, measured.own)
			}
		}
	}
	for _, r := range m.Rows {
		r.summary = summarize(r.Values)
		if cpu := summarize(r.cpu); cpu.Min > 0 {
			r.CPU = &cpu
			if s.apart {
				others := make([]float64, len(r.cpu))
				for i := range others {
					others[i] = r.cpu[i] - r.own[i]
				}
				r.Coordinator, r.Workers = new(summarize(r.own)), new(summarize(others))
			}
		}
		if base := rows[s.baseline]; base != nil && base != r {
			r.Ratios = ratios(r, base)
			r.Ratio = new(summarize(r.Ratios))
		}
	}
	for _, f := range s.figures {
		of, per := rows[f.of], rows[f.per]
		switch {
		case of == nil || f.per != "" && per == nil:
			// not all that it needs was selected
		case per == nil:
			m.Figures = append(m.Figures, measuredFigure{f.text, f.aim, s.unit.base, of.summary, s.unit})
		default:
			m.Figures = append(m.Figures, measuredFigure{f.text, f.aim, "", summarize(ratios(of, per)), noUnit})
		}
	}
	return m, nil
}

// ratios is round by round.
func ratios(of, per *row) []float64 {
	list := make([]float64, len(of.Values))
	for i := range list {
		list[i] = of.Values[i] / per.Values[i]
	}
	return list
}

// in writes the median in a unit, and how far the rounds are apart.
func (s summary) in(u unit) string {
	if s.Min == s.Max {
		return u.format(s.Median)
	}
	return fmt.Sprintf("%s (%s–%s)", u.format(s.Median), u.format(s.Min), u.format(s.Max))
}

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
	unit        unit
	rounds      int
	baseline    string // the contestant that ratios are of
	contestants []contestant
	figures     []figure
}

// A contestant is one row of a scenario.
type contestant struct {
	name string
	// measure is called once to warm up, unless the scenario has one round
	// only, and then once a round.
	measure func() (float64, error)
}

// A figure is what the project aims at: the ratio of two contestants, or what
// one of them measures.
type figure struct {
	text    string
	of, per string // contestants; per may be ""
	aim     string
}

// A unit is how a measured value is written.
type unit struct {
	name   string // as a table says it
	format func(float64) string
}

var (
	tasksPerSecond = unit{"tasks/s", func(v float64) string { return fmt.Sprintf("%.0f k", v/1e3) }}
	bytesPerSecond = unit{"MB/s each way", func(v float64) string { return fmt.Sprintf("%.0f", v/1e6) }}
	roundTrip      = unit{"µs a task", func(v float64) string { return fmt.Sprintf("%.1f", v*1e6) }}
	mebibytes      = unit{"MiB", func(v float64) string { return fmt.Sprintf("%.1f", v/(1<<20)) }}
	bytesPerTask   = unit{"bytes a task", func(v float64) string { return fmt.Sprintf("%.0f", v) }}
	perTask        = unit{"a task", func(v float64) string { return fmt.Sprintf("%.2f", v) }}
	nanoseconds    = unit{"ns a task", func(v float64) string { return fmt.Sprintf("%.0f", v*1e9) }}
	ratioUnit      = unit{"", func(v float64) string { return fmt.Sprintf("%.3g", v) }}
)

// A timing times f, which has n units of work done, and makes a value of it.
type timing func(n int, f func() error) (float64, error)

// perSecond times f, which has n units of work done.
func perSecond(n int, f func() error) (float64, error) {
	seconds, err := secondsEach(n, f)
	return 1 / seconds, err
}

// secondsEach times f, and gives the time of one of its n units of work.
func secondsEach(n int, f func() error) (float64, error) {
	start := time.Now()
	err := f()
	return time.Since(start).Seconds() / float64(n), err
}

// A row is what has been measured of a contestant, round by round.
type row struct {
	Name   string    `json:"name"`
	Values []float64 `json:"values"`
	Ratios []float64 `json:"ratios,omitempty"` // to the baseline of the same round
	summary
	Ratio *summary `json:"ratio,omitempty"`
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
	chosen := slices.DeleteFunc(slices.Clone(s.contestants), func(c contestant) bool {
		return !only.MatchString(s.name + "/" + c.name)
	})
	m := &measuredScenario{Name: s.name, Title: s.title, Unit: s.unit.name, Baseline: s.baseline, unit: s.unit}
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
			value, err := c.measure()
			if err != nil {
				return nil, fmt.Errorf("%s/%s: %w", s.name, c.name, err)
			}
			if round >= 0 {
				rows[c.name].Values = append(rows[c.name].Values, value)
			}
		}
	}
	for _, r := range m.Rows {
		r.summary = summarize(r.Values)
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
			m.Figures = append(m.Figures, measuredFigure{f.text, f.aim, s.unit.name, of.summary, s.unit})
		default:
			m.Figures = append(m.Figures, measuredFigure{f.text, f.aim, "", summarize(ratios(of, per)), ratioUnit})
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

func (s summary) spread(u unit) string {
	return u.format(s.Min) + "–" + u.format(s.Max)
}

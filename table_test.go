package taskexec

import (
	"maps"
	"math/rand/v2"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTableHoldsWhatAMapHolds(t *testing.T) {
	for _, test := range []struct {
		reason string
		number func(r *rand.Rand) int
	}{
		{"numbers that follow one another, as a run's do", func(r *rand.Rand) int { return r.IntN(64) }},
		{"numbers far apart, as a peer may choose them", func(r *rand.Rand) int { return r.IntN(64) * (maxNumber >> 6) }},
		{"the greatest numbers there are", func(r *rand.Rand) int { return maxNumber - r.IntN(64) }},
	} {
		r := rand.New(rand.NewPCG(1, 2))
		var table table[int]
		want := make(map[int]int)
		for step := range 20000 {
			n := test.number(r)
			_, there := want[n]
			if r.IntN(100) < 40+20*(step/5000%2) { // it grows and shrinks by turns
				if put := table.put(n, step); put == there {
					t.Fatalf("%s: step %d: put(%d) is %v", test.reason, step, n, put)
				}
				if !there {
					want[n] = step
				}
			} else {
				v, ok := table.take(n)
				if ok != there || v != want[n] {
					t.Fatalf("%s: step %d: take(%d) is %d, %v, want %d, %v", test.reason, step, n, v, ok, want[n], there)
				}
				delete(want, n)
			}
			n = test.number(r)
			v, ok := table.get(n)
			if w, there := want[n]; ok != there || v != w || table.len() != len(want) {
				t.Fatalf("%s: step %d: get(%d) is %d, %v, want %d, %v; %d of %d entries", test.reason, step, n, v, ok, w, there, table.len(), len(want))
			}
		}
		if diff := cmp.Diff(want, maps.Collect(table.all)); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", test.reason, diff)
		}
	}
}

// BenchmarkTable puts in and takes out what is in flight in a session whose
// worker reports in the order of the tasks, of which it is sent each stride-th.
func BenchmarkTable(b *testing.B) {
	for _, stride := range []int{1, 3, 1024} {
		b.Run(strconv.Itoa(stride), func(b *testing.B) {
			var table table[int]
			for i := range windowTasks {
				table.put(i*stride, i)
			}
			b.ResetTimer()
			for i := range b.N {
				if _, ok := table.take(i * stride); !ok {
					b.Fatal(i)
				}
				table.put((i+windowTasks)*stride, i)
			}
		})
	}
}

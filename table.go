package taskexec

import "math/bits"

// A table finds what is in flight in a session by its task's number. A map
// would do, but at four times the cost, on the path of every task on both sides.
// An entry that cannot be where it belongs is soon after, and entries stand in the
// order of where they belong (linear probing, as Robin Hood would have it). If a
// peer chose its numbers to collide, a search would take no longer than the
// window is wide.
//
// The zero value is empty.
type table[V any] struct {
	entries []tableEntry[V] // a power of two, never more than half of them used
	digit   uint            // bits of an index in entries
	used    int
}

type tableEntry[V any] struct {
	key   uint // the number plus 1; 0 is unused
	value V
}

func (t *table[V]) len() int { return t.used }

// home is where key belongs. Numbers that follow one another belong in places
// that do, so that a run walks through the memory of the table, and does not
// jump; those that are a multiple of its size apart are told apart by their
// higher digits.
func (t *table[V]) home(key uint) int {
	return int(key+key>>t.digit+key>>(2*t.digit)) & (len(t.entries) - 1)
}

// away is how far the entry at i is from where it belongs.
func (t *table[V]) away(i int) int {
	return (i - t.home(t.entries[i].key)) & (len(t.entries) - 1)
}

// find returns the index at which number is, or at which it would be put.
func (t *table[V]) find(number int) (i int, found bool) {
	if len(t.entries) == 0 {
		return 0, false
	}
	key := uint(number) + 1
	i = t.home(key)
	for far := 0; t.entries[i].key != key; far++ {
		if t.entries[i].key == 0 || t.away(i) < far {
			return i, false // it would have been put here
		}
		i = (i + 1) & (len(t.entries) - 1)
	}
	return i, true
}

// at is the value with the number that find has found at i. The pointer is valid
// until the table changes: values are written and read where they are, since
// moving them takes longer than finding them.
func (t *table[V]) at(i int) *V { return &t.entries[i].value }

func (t *table[V]) get(number int) (v V, ok bool) {
	i, ok := t.find(number)
	if ok {
		v = t.entries[i].value
	}
	return v, ok
}

// put enters v, and reports false, and does nothing, if number is there
// already.
func (t *table[V]) put(number int, v V) bool {
	p, added := t.add(number)
	if added {
		*p = v
	}
	return added
}

// add returns the value with number, as at does. If number is not there yet, it
// enters it with a zero value first.
func (t *table[V]) add(number int) (v *V, added bool) {
	if 2*t.used >= len(t.entries) {
		t.grow()
	}
	i, found := t.find(number)
	if found {
		return t.at(i), false
	}
	if t.entries[i].key != 0 {
		t.makeRoom(i)
	}
	t.entries[i].key = uint(number) + 1
	t.used++
	return t.at(i), true
}

// makeRoom moves what is at i, and what follows it without a gap, one place on:
// all of it belongs behind the entry that gets the place.
func (t *table[V]) makeRoom(i int) {
	last := len(t.entries) - 1
	var e tableEntry[V]
	for t.entries[i].key != 0 {
		t.entries[i], e = e, t.entries[i]
		i = (i + 1) & last
	}
	t.entries[i] = e
}

func (t *table[V]) grow() {
	old := t.entries
	t.entries = make([]tableEntry[V], max(16, 2*len(old)))
	t.digit = uint(bits.Len(uint(len(t.entries) - 1)))
	t.used = 0
	for _, e := range old {
		if e.key != 0 {
			t.put(int(e.key-1), e.value)
		}
	}
}

// take takes number out, and returns what was there.
func (t *table[V]) take(number int) (v V, ok bool) {
	i, ok := t.find(number)
	if !ok {
		return v, false
	}
	v = t.entries[i].value
	t.remove(i)
	return v, true
}

// remove takes out the number that find has found at i.
func (t *table[V]) remove(i int) {
	// What follows moves up, until an entry is where it belongs, so that what was
	// deleted needs no mark. Numbers that follow one another are all where they
	// belong, and nothing moves.
	last := len(t.entries) - 1
	for j := (i + 1) & last; t.entries[j].key != 0 && t.away(j) > 0; j = (j + 1) & last {
		t.entries[i] = t.entries[j]
		i = j
	}
	t.entries[i] = tableEntry[V]{}
	t.used--
}

// all gives the numbers and their values, in no particular order. The table must
// not be changed meanwhile.
func (t *table[V]) all(yield func(int, V) bool) {
	for _, e := range t.entries {
		if e.key != 0 && !yield(int(e.key-1), e.value) {
			return
		}
	}
}

// clear empties the table.
func (t *table[V]) clear() { *t = table[V]{} }

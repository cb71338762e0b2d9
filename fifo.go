package taskexec

// A fifo is a list: what was put in first is taken out first. The zero value is
// empty.
type fifo[T any] struct {
	list []T
	head int // of list; what was before it has been taken
}

func (f *fifo[T]) len() int { return len(f.list) - f.head }

// first is what pop will take. The list must not be empty.
func (f *fifo[T]) first() T { return f.list[f.head] }

// all is what is in the list. It is valid until the list changes.
func (f *fifo[T]) all() []T { return f.list[f.head:] }

// push uses the room of what was taken before it asks for more: a list that is
// never empty does not grow with all that passes through it.
func (f *fifo[T]) push(v T) {
	if len(f.list) == cap(f.list) && 2*f.head >= len(f.list) {
		n := copy(f.list, f.all())
		clear(f.list[n:])
		f.list, f.head = f.list[:n], 0
	}
	f.list = append(f.list, v)
}

// pop takes the first. The list must not be empty.
func (f *fifo[T]) pop() T {
	v := f.first()
	f.drop()
	return v
}

// drop takes the first away. The list must not be empty.
func (f *fifo[T]) drop() {
	var none T
	f.list[f.head] = none
	f.head++
	if f.head == len(f.list) {
		f.list, f.head = f.list[:0], 0
	}
}

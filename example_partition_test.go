package taskexec_test

import (
	"fmt"
	"strings"

	"example.com/taskexec"
)

func ExampleParseTasks() {
	tasks, err := taskexec.ParseTasks("a1 a2 c1\n日本")
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, task := range tasks {
		fmt.Printf("category %s, instruction %s\n", task.Category, task.Instruction)
	}
	// Output:
	// category a, instruction a1
	// category a, instruction a2
	// category c, instruction c1
	// category 日, instruction 日本
}

func ExampleParseTasks_invalid() {
	_, err := taskexec.ParseTasks("a1 b\xff")
	fmt.Println(err)
	// Output:
	// taskexec: invalid UTF-8 at byte 4: instructions must be UTF-8 text, convert the input to it
}

func ExampleScanTasks() {
	input := strings.NewReader("a1 a2\nc1\n") // a file, a pipe, standard input
	scanner := taskexec.ScanTasks(input)
	for task := range scanner.All() {
		fmt.Println(task.Category, task.Instruction)
	}
	if err := scanner.Err(); err != nil {
		fmt.Println(err)
	}
	// Output:
	// a a1
	// a a2
	// c c1
}

func ExamplePartition() {
	tasks, err := taskexec.ParseTasks("a1 a2 c1 b1 c2 b3 b2 b4 a3")
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, group := range taskexec.Partition(tasks) {
		fmt.Print(group.Category, ":")
		for _, task := range group.Tasks {
			fmt.Print(" ", task.Instruction)
		}
		fmt.Println()
	}
	// Output:
	// a: a1 a2 a3
	// b: b1 b3 b2 b4
	// c: c1 c2
}

// A category may have a name of its own; then the instruction can be anything.
func ExamplePartition_categories() {
	for _, group := range taskexec.Partition([]taskexec.Task{
		{Category: "render", Instruction: `{"frame": 1}`},
		{Category: "encode", Instruction: `{"film": "x"}`},
		{Category: "render", Instruction: `{"frame": 2}`},
	}) {
		fmt.Println(group.Category, len(group.Tasks))
	}
	// Output:
	// encode 1
	// render 2
}

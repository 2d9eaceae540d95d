// Goroutines that hand work on through channels, with garbage for the collector, timers and a mutex.
package main

import (
	"crypto/sha256"
	"fmt"
	"sort"
	"sync"
	"time"
)

func main() {
	work, done := make(chan int, 8), make(chan string, 8)
	var mutex sync.Mutex
	lengths := map[int]int{}
	var group sync.WaitGroup
	for g := 0; g < 6; g++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for n := range work {
				sum := sha256.Sum256([]byte(fmt.Sprint(n)))
				kept := [][]byte{}
				for i := 0; i < 40000; i++ {
					sum = sha256.Sum256(sum[:])
					kept = append(kept, append([]byte{}, sum[:8]...))
				}
				mutex.Lock()
				lengths[n%7] += len(kept)
				mutex.Unlock()
				done <- fmt.Sprintf("%03d %x", n, sum)
			}
		}()
	}
	ticks := time.NewTicker(3 * time.Millisecond)
	defer ticks.Stop()
	go func() {
		for n := 0; n < 300; n++ {
			if n%10 == 0 {
				<-ticks.C
			}
			work <- n
		}
		close(work)
		group.Wait()
		close(done)
	}()
	lines := []string{}
	for line := range done {
		lines = append(lines, line)
	}
	sort.Strings(lines)
	for _, line := range lines {
		fmt.Println(line)
	}
	fmt.Println(len(lengths), lengths)
}

# A linear generator with an array that counts.
set s 1
array set seen {}
for {set i 0} {$i < 2500000} {incr i} { set s [expr {($s * 48271) % 2147483647}]; incr seen([expr {$s % 5003}]) }
foreach k [lsort -integer [array names seen]] { puts "$k $seen($k)" }

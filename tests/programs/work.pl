# Words counted, turned around and sorted, with a hash of hashes.
my (%n, %by, $x);
while (<>) {
    $n{$_}++ for /(\w+)/g;
    s/(\w)(\w*)/$2$1/g;
    $by{length $1}{$1}++ while /(\w+)/g;
    $x ^= length;
}
print "$_ $n{$_}\n" for sort keys %n;
print "$_ ", scalar keys %{ $by{$_} }, "\n" for sort keys %by;
print "$x\n";

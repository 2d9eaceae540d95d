# Children with pipes both ways, alarms, and their exit statuses.
use strict;
use Digest::SHA qw(sha256_hex);
use Time::HiRes qw(ualarm);
my $alarms = 0;
$SIG{ALRM} = sub { $alarms++; ualarm 50_000 };
ualarm 50_000;
$| = 1;
for my $round (1 .. 12) {
    my @children;
    for my $n (1 .. 3) {
        pipe(my $from, my $to) or die;
        pipe(my $back, my $answer) or die;
        my $pid = fork // die;
        if (!$pid) {
            $SIG{ALRM} = 'DEFAULT'; ualarm 0;
            close $to; close $back;
            my $h = <$from>;
            $h = sha256_hex($h) for 1 .. 40_000;
            print $answer "$h\n";
            close $answer;
            exit $round + $n;
        }
        close $from; close $answer;
        print $to "$round $n\n";
        close $to;
        push @children, [$pid, $back];
    }
    for my $child (@children) {
        my ($pid, $back) = @$child;
        my $line;
        { $line = <$back>; redo if !defined $line && $!{EINTR}; }
        chomp $line;
        my $ended;
        do { $ended = waitpid $pid, 0 } while $ended == -1 && $!{EINTR};
        print "$round $line ", $? >> 8, "\n";
    }
}
print $alarms > 0 ? "alarms came\n" : "no alarm came\n";

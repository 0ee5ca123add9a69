"""Early exit looked at from outside: reports and pictures of what it did, schedule files, its speed."""

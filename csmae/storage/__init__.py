"""The storage of studies: a folder, or a bucket that mirrors one."""

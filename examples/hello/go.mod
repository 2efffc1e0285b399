module example.org/hello

go 1.22

require example.org/greet v1.2.0

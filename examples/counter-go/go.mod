module counter-go

go 1.26

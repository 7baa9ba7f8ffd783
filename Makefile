# Tiffin on a Debian 12 machine, as root or with sudo. Each target works on a fresh clone and again on a used one.
#
#   make up      install what is missing, build, make the default image, start the server, show a VM at work
#   make down    end every VM and the server, and clean the host; images and the database stay
#   make test    every test, on real VMs too
#   make check   format, lints, documentation
#   make bench   figures against the bare engine
#
# Everything that is made here lies in .tiffin and in target. TIFFIN_LISTEN=127.0.0.1:3001 make up takes another port.

.DEFAULT_GOAL := up
.PHONY: up down test check bench setup build runsc kernel image server

up: server
	@scripts/demo.sh

down:
	@scripts/server.sh clean

test:
	@scripts/setup.sh test
	@scripts/build.sh
	@scripts/fetch-runsc.sh
	@scripts/fetch-kernel.sh
	@scripts/image.sh
	@scripts/test.sh

check: setup
	@scripts/check.sh

bench: server
	@scripts/bench.sh $(ARGS)

setup:
	@scripts/setup.sh

build: setup
	@scripts/build.sh

runsc: setup
	@scripts/fetch-runsc.sh

kernel: setup
	@scripts/fetch-kernel.sh

image: build runsc kernel
	@scripts/image.sh

server: image
	@scripts/server.sh start

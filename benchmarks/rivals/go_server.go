// SPDX-License-Identifier: MIT

// Go's net, as people write it, and with --tuned lines answered by one write for each batch that was read.
package main

import (
	"bufio"
	"crypto/tls"
	"flag"
	"fmt"
	"net"
	"os"
)

const (
	receiveBytes  = 65536 // as the handlers of the other servers
	recordBytes   = 16384 // the largest that TLS knows
	smallBytes    = 4096  // for short and idle connections: what costs less to clear and to hold
	datagramBytes = 8192  // as socketserver's max_packet_size
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func echo(conn net.Conn, size int) {
	defer conn.Close()
	buffer := make([]byte, size)
	for {
		n, err := conn.Read(buffer)
		if err != nil {
			return
		}
		if _, err := conn.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func lines(conn net.Conn) {
	defer conn.Close()
	reader := bufio.NewReader(conn)
	for {
		line, err := reader.ReadSlice('\n')
		if err != nil {
			return
		}
		if _, err := conn.Write(line); err != nil {
			return
		}
	}
}

// What was answered goes out before each Read of the connection.
type flushing struct {
	net.Conn
	writer *bufio.Writer
}

func (f flushing) Read(buffer []byte) (int, error) {
	if err := f.writer.Flush(); err != nil {
		return 0, err
	}
	return f.Conn.Read(buffer)
}

func tunedLines(conn net.Conn) {
	defer conn.Close()
	writer := bufio.NewWriterSize(conn, receiveBytes)
	reader := bufio.NewReaderSize(flushing{conn, writer}, receiveBytes)
	for {
		line, err := reader.ReadSlice('\n')
		if err != nil {
			return
		}
		writer.Write(line) // its error comes back from Flush
	}
}

func datagrams() {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	check(err)
	fmt.Println(conn.LocalAddr().(*net.UDPAddr).Port)
	buffer := make([]byte, datagramBytes)
	for {
		n, peer, err := conn.ReadFromUDPAddrPort(buffer)
		check(err)
		conn.WriteToUDPAddrPort(buffer[:n], peer)
	}
}

func main() {
	work := flag.String("work", "echo", "echo, lines, churn, udp or tls")
	tuned := flag.Bool("tuned", false, "answer a batch of lines by one write")
	certificate := flag.String("certificate", "", "for tls")
	key := flag.String("key", "", "for tls")
	flag.Parse()
	if *work == "udp" {
		datagrams()
	}
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	check(err)
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	sizes := map[string]int{"echo": receiveBytes, "tls": recordBytes, "churn": smallBytes}
	serve := func(conn net.Conn) { echo(conn, sizes[*work]) }
	if *work == "lines" {
		serve = lines
	}
	if *tuned && *work == "lines" {
		serve = tunedLines
	}
	if *work == "tls" {
		pair, err := tls.LoadX509KeyPair(*certificate, *key)
		check(err)
		listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{pair}})
	}
	for {
		conn, err := listener.Accept()
		check(err)
		go serve(conn)
	}
}

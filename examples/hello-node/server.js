'use strict';

// A web app on node's own http module. It listens where tako tells it to,
// answers the health probe on /status, and on SIGTERM finishes what it has begun.
const http = require('node:http');

const {
  TAKO_APP_SOCKET, PORT = '3000', HOST = '127.0.0.1',
  TAKO_INSTANCE = 'none', TAKO_VERSION = 'none',
} = process.env;

const server = http.createServer((req, res) => {
  const { pathname } = new URL(req.url, 'http://app');
  if (pathname === '/status') {
    res.end('ok\n');
  } else if (pathname === '/echo' && req.method === 'POST') {
    res.writeHead(200, { 'content-type': req.headers['content-type'] ?? 'application/octet-stream' });
    req.pipe(res);
  } else if (pathname === '/') {
    res.setHeader('content-type', 'text/plain; charset=utf-8');
    res.end(`Hello from node ${process.versions.node}: instance ${TAKO_INSTANCE}, release ${TAKO_VERSION}\n`);
  } else {
    res.writeHead(404, { 'content-type': 'text/plain' });
    res.end('nothing here\n');
  }
});

server.listen(TAKO_APP_SOCKET ? { path: TAKO_APP_SOCKET } : { port: Number(PORT), host: HOST }, () => {
  console.log('listening on', server.address());
});

process.on('SIGTERM', () => {
  server.close(() => process.exit(0));
  server.closeIdleConnections();
});

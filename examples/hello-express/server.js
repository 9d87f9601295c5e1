import express from 'express';

// Express as its guide has it. It knows nothing of tako: the port comes from
// PORT, and app.json names /healthz, since there is no /status.
const app = express();

app.get('/', (req, res) => {
  res.json({
    greeting: process.env.GREETING,
    secret: process.env.SECRET ? 'set' : 'not set',
    release: process.env.TAKO_VERSION,
    instance: process.env.TAKO_INSTANCE,
    host: req.get('host'),
    proto: req.get('x-forwarded-proto'),
  });
});

app.get('/healthz', (req, res) => res.send('ok'));

app.post('/echo', express.json({ limit: '5mb' }), (req, res) => res.json(req.body));

const server = app.listen(Number(process.env.PORT ?? 3000), process.env.HOST ?? '127.0.0.1', (err) => {
  if (err) throw err;
  console.log('listening on', server.address());
});

process.on('SIGTERM', () => {
  server.close(() => process.exit(0));
});

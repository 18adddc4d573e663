// The equivalent shell commands: curl, a recipe of this repository, and the nats CLI.

/// The page does not know the broker's address; the nats CLI takes it from its context or NATS_URL.
const NATS = 'nats --user viewer --password viewer';

export function curl(path) {
  return ['curl', `curl -s ${quoted(location.origin + path)}`];
}

export function curlPost(path, body, key) {
  const data = body ? ` -H 'Content-Type: application/json' -d ${quoted(JSON.stringify(body))}` : ' -X POST';
  return ['curl', `curl -s ${quoted(location.origin + path)}${key ? ` -H ${quoted(`Idempotency-Key: ${key}`)}` : ''}${data}`];
}

export function dev(recipe) {
  return ['dev', `./dev ${recipe}`];
}

export function nats(command) {
  return ['nats', `${NATS} ${command}`];
}

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

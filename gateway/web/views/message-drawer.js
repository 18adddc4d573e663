// A message as it was published: headers, body, and the commands to read it.

import { html } from '../vendor/htm-preact.js';
import { t, tOr } from '../i18n.js';
import { dev, nats } from '../shell.js';
import { Copy, Dialog, Shell } from '../ui.js';

/// `published`: the step with the message's position in the stream, if there is one.
export function MessageDrawer({ step, published, onClose }) {
  const { subject, payload } = step.message;
  const headers = { ...fromKey(step), ...step.message.headers };
  const stream = subject.startsWith('gozon.payments.') ? 'PAYMENTS' : 'ORDERS';
  const body = JSON.stringify(payload, null, 2);
  const commands = [dev(`peek ${stream}`)];
  if (published?.stream_sequence) commands.push(nats(`stream get ${stream} ${published.stream_sequence}`));
  return html`<${Dialog} title=${tOr(`event.${step.event}`, step.event)} onClose=${onClose} data-test="drawer">
    <p class="quiet"><code>${subject}</code>${published?.stream_sequence && html` · ${t('fact.sequence', { n: published.stream_sequence, stream })}`}</p>
    <h3>${t('drawer.headers')}</h3>
    <dl class="headers">${Object.entries(headers).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd><code>${String(value)}</code></dd></div>`)}</dl>
    <h3>${t('drawer.payload')} <${Copy} text=${body} /></h3>
    <pre class="payload" tabindex="0">${body}</pre>
    <${Shell} commands=${commands} />
  <//>`;
}

/// Headers that the outbox does not store, because they are derived from the row's key.
function fromKey({ event_id: id, n }) {
  return { 'ce-specversion': '1.0', 'ce-id': id, 'Nats-Msg-Id': n ? `${id}.r${n}` : id };
}

// A small plot: the shape of the last minutes, and the newest value.

import { html } from '../vendor/htm-preact.js';

const WIDTH = 160;
const HEIGHT = 36;
const MARGIN = 2;

export function Sparkline({ values, label, wide }) {
  const top = Math.max(1, ...values);
  const x = (place) => (place * WIDTH) / Math.max(1, values.length - 1);
  const y = (value) => HEIGHT - MARGIN - (value * (HEIGHT - 2 * MARGIN)) / top;
  const line = values.map((value, place) => `${place ? 'L' : 'M'}${x(place).toFixed(1)} ${y(value).toFixed(1)}`).join('');
  const area = `${line}L${WIDTH} ${HEIGHT}L0 ${HEIGHT}Z`;
  return html`<svg class=${`sparkline ${wide ? 'sparkline-wide' : ''}`} viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label=${label}>
    ${values.length > 1 && html`<path class="sparkline-area" d=${area} /><path class="sparkline-line" d=${line} vector-effect="non-scaling-stroke" />`}
  </svg>`;
}

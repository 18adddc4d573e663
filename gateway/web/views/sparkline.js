// A small plot: the shape of the last minutes, and the newest value.

import { html } from '../vendor/htm-preact.js';

const WIDTH = 160;
const HEIGHT = 36;
const MARGIN = 2;

/// Where nothing is known (null), nothing is drawn.
export function Sparkline({ values, label, wide }) {
  const top = Math.max(1, ...values);
  const x = (place) => ((place * WIDTH) / Math.max(1, values.length - 1)).toFixed(1);
  const y = (value) => (HEIGHT - MARGIN - (value * (HEIGHT - 2 * MARGIN)) / top).toFixed(1);
  const lines = runs(values).map((run) => run.map(([place, value]) => `${x(place)} ${y(value)}`).join('L'));
  const areas = runs(values).map((run, which) => `M${x(run[0][0])} ${HEIGHT}L${lines[which]}L${x(run.at(-1)[0])} ${HEIGHT}Z`);
  return html`<svg class=${`sparkline ${wide ? 'sparkline-wide' : ''}`} viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label=${label}>
    ${lines.length > 0 && html`<path class="sparkline-area" d=${areas.join('')} /><path class="sparkline-line" d=${`M${lines.join('M')}`} vector-effect="non-scaling-stroke" />`}
  </svg>`;
}

/// Neighbours that are known, each with its place.
function runs(values) {
  const found = [];
  values.forEach((value, place) => {
    if (value === null) return;
    if (place === 0 || values[place - 1] === null) found.push([]);
    found.at(-1).push([place, value]);
  });
  return found;
}

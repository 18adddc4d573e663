// A small plot of the last minutes with the newest value.

import { html } from '../vendor/htm-preact.js';

const WIDTH = 160;
const HEIGHT = 36;
const MARGIN = 2;

/// Unknown values (null) are gaps.
export function Sparkline({ values, label, wide }) {
  const top = Math.max(1, ...values);
  const x = (index) => ((index * WIDTH) / Math.max(1, values.length - 1)).toFixed(1);
  const y = (value) => (HEIGHT - MARGIN - (value * (HEIGHT - 2 * MARGIN)) / top).toFixed(1);
  const lines = runs(values).map((run) => run.map(([index, value]) => `${x(index)} ${y(value)}`).join('L'));
  const areas = runs(values).map((run, which) => `M${x(run[0][0])} ${HEIGHT}L${lines[which]}L${x(run.at(-1)[0])} ${HEIGHT}Z`);
  return html`<svg class=${`sparkline ${wide ? 'sparkline-wide' : ''}`} viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label=${label}>
    ${lines.length > 0 && html`<path class="sparkline-area" d=${areas.join('')} /><path class="sparkline-line" d=${`M${lines.join('M')}`} vector-effect="non-scaling-stroke" />`}
  </svg>`;
}

/// Runs of known values, each value with its index.
function runs(values) {
  const found = [];
  values.forEach((value, index) => {
    if (value === null) return;
    if (index === 0 || values[index - 1] === null) found.push([]);
    found.at(-1).push([index, value]);
  });
  return found;
}

// What goes on beside what the reader does: requests without an answer yet, and what became of those that a reload met.

import { html, useEffect } from '../vendor/htm-preact.js';
import { dismiss, giveUp, resumed, underWay } from '../errands.js';
import { t, tOr } from '../i18n.js';
import { money } from '../money.js';
import { useStore } from '../store.js';
import { OrderLink, WhereItShows, announce } from '../ui.js';

export function Outcomes() {
  const waiting = useStore(underWay).filter((errand) => errand.problem);
  const outcomes = useStore(resumed);
  return html`<div class="outcomes">
    ${waiting.map((errand) => html`<${Unanswered} key=${errand.id} errand=${errand} />`)}
    ${outcomes.map((outcome) => html`<${Resumed} key=${outcome.id} outcome=${outcome} />`)}
  </div>`;
}

function Unanswered({ errand }) {
  const { problem } = errand;
  return html`<div class="note note-waiting" role="status" data-test="unanswered">
    <strong>${t('unanswered.title', { what: described(errand.steps[errand.done]) })}</strong>
    <p>${tOr(`problem.${problem.code}`, problem.title)}. ${t('unanswered.again')}</p>
    <button type="button" class="link" onClick=${() => giveUp(errand.id)}>${t('unanswered.give-up')}</button>
  </div>`;
}

function Resumed({ outcome }) {
  const { id, steps, answers, doneBefore, problem } = outcome;
  const failed = problem && steps[answers.length];
  const ending = !problem ? 'done' : problem.code === 'given_up' ? 'given-up' : answers.length ? 'refused-then' : 'refused';
  const text = t(`resumed.${ending}`, { what: failed && described(failed) });
  useEffect(() => announce(`${t('resumed.title')} ${text}`), []);
  return html`<div class=${`note note-resumed ${problem ? 'note-waiting' : 'note-good'}`} data-test="resumed" data-replayed=${String(answers.some((answer) => answer.replayed))}>
    <div>
      <strong>${t('resumed.title')}</strong>
      <ul>${steps.slice(0, answers.length).map((step, place) => html`<li key=${step.key}>
        ${described(step)}: ${t(place < doneBefore ? 'resumed.before' : answers[place].replayed ? 'resumed.replayed' : 'resumed.sent')}
        ${step.kind === 'order' && html` <${OrderLink} id=${answers[place].answer.id} />`}
      </li>`)}</ul>
      ${problem && html`<p>${text} <span lang="en">${problem.detail}</span> ${problem.step && html`<${WhereItShows} step=${failed} />`}</p>`}
    </div>
    <button type="button" class="button-quiet" onClick=${() => dismiss(id)} aria-label=${t('close')}>✕</button>
  </div>`;
}

function described(step) {
  const amount = step.body.amount && money(step.body.amount);
  return t(`errand.${step.kind}`, { amount, what: step.body.description, user: step.body.user_id });
}

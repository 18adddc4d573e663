// Starts the page.

import { html, render } from './vendor/htm-preact.js';
import { resumePending } from './pending-requests.js';
import { speak } from './i18n.js';
import { connect } from './live.js';
import { count } from './rates.js';
import { App } from './app.js';

count();
connect();
resumePending();
await speak();
render(html`<${App} />`, document.getElementById('page'));
